"""`--trainer.strategy zero2_muon`: data parallelism with ZeRO-2 sharded Muon state; the result equals one process's."""

import signal
import sys
import threading
from types import FrameType
from typing import Any, Literal

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.distributed.distributed_c10d import _abort_process_group

from lmchat.optim.muon_adamw import MuonAdamW
from lmchat.optim.sharded import ShardedMuonAdamW
from lmchat.strategies.checkpoint_io import LMChatCheckpointIO
from lmchat.strategies.lightning_internals import (
    broadcast_module_states,
    ends_optimizer_step,
    keep_other_ranks_alive,
    process_group_timeout,
    stop_after_batch,
    take_over_sigterm,
)
from lmchat.types import RankFailure, UserError


class LeftBeforeStep(RankFailure):
    """Another rank failed before this step changed anything."""


class Zero2MuonStrategy(DDPStrategy):
    """Data parallelism with gradients and optimizer state sharded by `ShardedMuonAdamW`.

    The module is not wrapped, so gradient accumulation needs no communication; reductions start in the backward pass of
    the last micro-batch of a step. Every rank saves its own optimizer file, and any number of ranks can resume.

    SIGTERM or Ctrl-C on any rank ends training on all ranks after the current step or evaluation batch; a second Ctrl-C
    ends it at once. (Lightning would synchronize at every micro-batch, and broadcast within the signal handler, between
    the collectives of the step.) When a rank fails, the others notice it through a gloo group, so that NCCL kernels
    that wait for the failed rank cannot block them.

    Args:
        gather_dtype: dtype in which new parameters are gathered; "auto" is bf16 where the network computes in bf16.
        bucket_mebibytes: size of a gradient message in MiB.
        kwargs: arguments of `DDPStrategy`, e.g. ``process_group_backend``, ``timeout``.

    Attributes:
        control_group: group of all ranks on the CPU, for a few numbers; during training only.
        agreed_signal: the signal that ended the run on all ranks, 0 for none.
    """

    shards_optimizer = True

    def __init__(
        self,
        *args: Any,
        gather_dtype: Literal["auto", "fp32", "bf16"] = "auto",
        bucket_mebibytes: int = 32,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._gather_dtype = gather_dtype
        self._bucket_bytes = bucket_mebibytes * 2**20
        self.control_group: dist.ProcessGroup | None = None
        self._signal_here = 0
        self._sigint_handler: Any = None
        self._abandoned = False
        self.agreed_signal = 0

    def setup_environment(self) -> None:
        super().setup_environment()
        self.checkpoint_io = LMChatCheckpointIO(self.global_rank, self.world_size)

    def configure_ddp(self) -> None:
        """Broadcasts parameters and buffers of rank 0; the module is not wrapped."""
        assert self.lightning_module is not None
        broadcast_module_states(self.lightning_module)

    def setup_optimizers(self, trainer: L.Trainer) -> None:
        super().setup_optimizers(trainer)
        if len(self.optimizers) != 1 or not isinstance(self.optimizers[0], MuonAdamW):
            names = [type(optimizer).__name__ for optimizer in self.optimizers]
            raise UserError(
                f"--trainer.strategy zero2_muon needs one MuonAdamW, not {names}; use --trainer.strategy ddp"
            )
        if trainer.gradient_clip_val:
            raise UserError(
                f"--trainer.gradient_clip_val is {trainer.gradient_clip_val}, but with zero2_muon no rank has whole "
                "gradients; leave it null, or use --trainer.strategy ddp"
            )
        self._take_over_signals(trainer)
        plain, network = self.optimizers[0], getattr(self.lightning_module, "net", None)
        computes_in = getattr(network, "compute_dtype", torch.float32)
        narrow = self._gather_dtype == "bf16" or (self._gather_dtype == "auto" and computes_in == torch.bfloat16)
        self.optimizer = ShardedMuonAdamW(
            plain.param_groups,
            self._agree,
            gather_dtype=torch.bfloat16 if narrow else None,
            bucket_bytes=self._bucket_bytes,
            polar_dtype=plain.polar_dtype,
            compile=plain.compile,
        )
        self.optimizers = [self.optimizer]

    def pre_backward(self, closure_loss: Tensor) -> None:
        assert self.lightning_module is not None
        if ends_optimizer_step(self.lightning_module.trainer):
            self.optimizer.reduce_during_backward()

    def optimizer_step(self, *args: Any, **kwargs: Any) -> Any:
        output = super().optimizer_step(*args, **kwargs)
        if self.agreed_signal:
            assert self.lightning_module is not None
            stop_after_batch(self.lightning_module.trainer)
            keep_other_ranks_alive(self.launcher)
        return output

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        self.agree_while_evaluating(busy=True)
        return super().validation_step(*args, **kwargs)

    def agree_while_evaluating(self, busy: bool) -> bool:
        """Whether any rank is still evaluating. Raises SIGTERMException on all ranks after a signal on any rank."""
        if self.control_group is None:  # not training
            return False
        any_busy = bool(self._agree(torch.tensor([busy], dtype=torch.uint8)))
        if self.agreed_signal:
            keep_other_ranks_alive(self.launcher)
            raise SIGTERMException
        return any_busy

    def _agree(self, flags: Tensor) -> Tensor:
        """The maximum of ``flags`` over the ranks; also exchanges the signals they have received."""
        message = torch.cat([flags, flags.new_tensor([self._signal_here])])
        try:
            dist.all_reduce(message, op=dist.ReduceOp.MAX, group=self.control_group)
        except RuntimeError as error:
            raise LeftBeforeStep("another rank has failed") from error
        self.agreed_signal = int(message[-1])
        return message[:-1]

    def _take_over_signals(self, trainer: L.Trainer) -> None:
        # A separate group on the CPU neither waits for the device nor interferes with its collectives.
        self.control_group = dist.new_group(backend="gloo", timeout=process_group_timeout(self))
        # First in the list, since later callbacks reduce metrics over the ranks.
        trainer.callbacks.insert(0, _AwaitEvaluation())  # type: ignore[attr-defined]
        take_over_sigterm(trainer, self._on_signal)
        if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
            self._sigint_handler = signal.signal(signal.SIGINT, self._on_signal)

    def _on_signal(self, signum: int | signal.Signals, _: FrameType | None) -> None:
        if signum == signal.SIGINT:
            if self._signal_here == signal.SIGINT:
                raise KeyboardInterrupt
            rank_zero_info("stopping after this step; press Ctrl-C again to stop at once")
        self._signal_here = max(self._signal_here, int(signum))

    def on_exception(self, exception: BaseException) -> None:
        """Closes the connections to the other ranks, which may be waiting for this one. Saving does not need them."""
        super().on_exception(exception)
        keep_other_ranks_alive(self.launcher)
        if self.control_group is None or isinstance(exception, SIGTERMException):  # all ranks have been notified
            return
        dist.destroy_process_group(self.control_group)
        self.control_group = None
        if self.root_device.type == "cpu":
            dist.destroy_process_group()
        else:
            self._abandoned = True

    def teardown(self) -> None:
        if self._abandoned:
            # Kernels that wait for a failed rank would block freeing memory and the exit. Not earlier: until everything
            # is saved, an abort could free memory that another rank still reads. (Never run on a GPU.)
            _abort_process_group()
        if self._sigint_handler is not None:
            signal.signal(signal.SIGINT, self._sigint_handler)
            self._sigint_handler = None
        super().teardown()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The exact weights of the module; during an exception the local ones, since other ranks may have failed."""
        if self.optimizers and sys.exception() is None:
            self.optimizer.gather_exact()
        return super().lightning_module_state_dict()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Saves on every rank; each writes its own optimizer file."""
        self.checkpoint_io.save_checkpoint(checkpoint, filepath, storage_options=storage_options)


def reduce_numbers(trainer: L.Trainer, numbers: Tensor, op: Any = dist.ReduceOp.SUM) -> Tensor:
    """Reduces a few numbers over the ranks, a tensor of one shape and dtype; returns it on the CPU, with a device sync.

    Lightning's ``Strategy.reduce`` would add a barrier. In training, zero2_muon reduces over its CPU group, which
    raises RuntimeError if another rank has failed; NCCL would wait for that rank and ignore signals.
    """
    if trainer.world_size == 1:
        return numbers.cpu()
    group = getattr(trainer.strategy, "control_group", None)
    numbers = numbers.to(trainer.strategy.root_device if group is None else "cpu")
    dist.all_reduce(numbers, op=op, group=group)
    return numbers.cpu()


class _AwaitEvaluation(Callback):
    """Waits until all ranks have evaluated their batches, whose numbers may differ, before metrics are reduced."""

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        assert isinstance(trainer.strategy, Zero2MuonStrategy)
        while trainer.strategy.agree_while_evaluating(busy=False):
            pass


StrategyRegistry.register(
    "zero2_muon",
    Zero2MuonStrategy,
    description="ZeRO-2 for MuonAdamW: gradients and optimizer state sharded over the ranks",
)
