"""`--trainer.strategy zero2_muon`: many processes train what one trains, with the optimizer's state shared out."""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType
from typing import Any, Literal

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.overrides.distributed import _sync_module_states
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.distributed.distributed_c10d import _abort_process_group

from lmchat.optim.muon_adamw import MuonAdamW
from lmchat.optim.sharded import ShardedMuonAdamW
from lmchat.strategies.checkpoint_io import LMChatCheckpointIO
from lmchat.types import RankFailure, UserError


class LeftBeforeStep(RankFailure):
    """Another rank has failed before this step has changed anything."""


class Zero2MuonStrategy(DDPStrategy):
    """Replicated parameters, sharded gradients and optimizer state: `ShardedMuonAdamW` in place of the MuonAdamW.

    The module is not wrapped, so accumulation needs no communication; reductions start in the backward pass of the
    micro-batch that ends a step. Every rank saves its own optimizer file, and any number of ranks can resume.

    SIGTERM or Ctrl-C on any rank ends training on all ranks, after the step or the evaluation's batch in which they
    learn of it; a second Ctrl-C ends it at once. Lightning would ask at every micro-batch, and broadcast from within
    the signal handler, between this step's collectives. Where a rank fails, the others learn of it on the CPU, which no
    kernel of NCCL holds up that waits for that rank.

    Args:
        gather_dtype: in which new parameters travel; "auto" is bf16 where the network computes in bf16.
        bucket_mebibytes: size of a message of gradients.
        kwargs: as of `DDPStrategy`, e.g. ``process_group_backend``, ``timeout``.

    Attributes:
        agreed_signal: the signal that ended the run on all ranks, 0 for none.
    """

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
        self._control_group: dist.ProcessGroup | None = None
        self._signal_here = 0
        self._sigint_handler: Any = None
        self._abandoned = False
        self.agreed_signal = 0

    def setup_environment(self) -> None:
        super().setup_environment()
        self.checkpoint_io = LMChatCheckpointIO(self.global_rank, self.world_size, elastic=True)

    def configure_ddp(self) -> None:
        """Gives every rank the first one's parameters and buffers; the module is left unwrapped."""
        assert self.lightning_module is not None
        _sync_module_states(self.lightning_module)

    def setup_optimizers(self, trainer: L.Trainer) -> None:
        super().setup_optimizers(trainer)
        if len(self.optimizers) != 1 or not isinstance(self.optimizers[0], MuonAdamW):
            names = [type(optimizer).__name__ for optimizer in self.optimizers]
            raise UserError(
                f"--trainer.strategy zero2_muon needs one MuonAdamW, not {names}; use --trainer.strategy ddp"
            )
        if trainer.gradient_clip_val:
            raise UserError(
                f"--trainer.gradient_clip_val is {trainer.gradient_clip_val}, but with zero2_muon no rank holds whole "
                "gradients; leave it null"
            )
        self._take_over_signals(trainer)
        plain = self.optimizers[0]
        self.optimizers = [
            ShardedMuonAdamW(
                plain.param_groups,
                self._agree,
                gather_dtype=self._narrow_gather_dtype(),
                bucket_bytes=self._bucket_bytes,
                polar_dtype=plain.polar_dtype,
                compile=plain.compile,
            )
        ]

    def _narrow_gather_dtype(self) -> torch.dtype | None:
        network = getattr(self.lightning_module, "net", None)
        computes_in = getattr(network, "compute_dtype", torch.float32)
        narrow = self._gather_dtype == "bf16" or (self._gather_dtype == "auto" and computes_in == torch.bfloat16)
        return torch.bfloat16 if narrow else None

    @property
    def optimizer(self) -> ShardedMuonAdamW:
        """The one optimizer."""
        (optimizer,) = self.optimizers
        assert isinstance(optimizer, ShardedMuonAdamW)
        return optimizer

    def pre_backward(self, closure_loss: Tensor) -> None:
        assert self.lightning_module is not None
        if not self.lightning_module.trainer.fit_loop._should_accumulate():
            self.optimizer.reduce_during_backward()

    def optimizer_step(self, *args: Any, **kwargs: Any) -> Any:
        output = super().optimizer_step(*args, **kwargs)
        if self.agreed_signal:
            assert self.lightning_module is not None
            # Lightning raises SIGTERMException at the end of this batch.
            self.lightning_module.trainer._signal_connector.received_sigterm = True
            self._let_ranks_exit()
        return output

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        self._agree_while_evaluating(busy=True)
        return super().validation_step(*args, **kwargs)

    def await_evaluation(self) -> None:
        """Returns when all ranks have evaluated their batches: some may have more than others."""
        while self._agree_while_evaluating(busy=False):
            pass

    def _agree_while_evaluating(self, busy: bool) -> bool:
        """Whether any rank still evaluates. Raises SIGTERMException on all ranks after a signal on one."""
        if self._control_group is None:  # not training
            return False
        any_busy = bool(self._agree(torch.tensor([busy], dtype=torch.uint8)))
        if self.agreed_signal:
            self._let_ranks_exit()
            raise SIGTERMException
        return any_busy

    def _agree(self, flags: Tensor) -> Tensor:
        """The maximum over ranks; the signals they have received along with it."""
        message = torch.cat([flags, flags.new_tensor([self._signal_here])])
        try:
            dist.all_reduce(message, op=dist.ReduceOp.MAX, group=self._control_group)
        except RuntimeError as error:
            raise LeftBeforeStep("another rank has failed") from error
        self.agreed_signal = int(message[-1])
        return message[:-1]

    def reduce_numbers(self, numbers: Tensor, op: Any) -> Tensor:
        """A few numbers on the CPU, in place, over the control group, during training."""
        dist.all_reduce(numbers, op=op, group=self._control_group)
        return numbers

    def _take_over_signals(self, trainer: L.Trainer) -> None:
        # A group of its own on the CPU: asking neither waits for the device nor gets in between its collectives.
        self._control_group = dist.new_group(backend="gloo")
        trainer.callbacks.append(_AwaitEvaluation())  # type: ignore[attr-defined]
        trainer._signal_connector._sigterm_notifier_fn = self._on_signal  # type: ignore[method-assign]
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
        if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
            self._sigint_handler = signal.signal(signal.SIGINT, self._on_signal)

    def _on_signal(self, signum: int | signal.Signals, _: FrameType | None) -> None:
        if signum == signal.SIGINT:
            if self._signal_here == signal.SIGINT:
                raise KeyboardInterrupt
            rank_zero_info("stopping after this step; press Ctrl-C again to stop at once")
        self._signal_here = max(self._signal_here, int(signum))

    def _let_ranks_exit(self) -> None:
        # Lightning kills all ranks as soon as it sees that one has exited with a status other than 0.
        if isinstance(self.launcher, _SubprocessScriptLauncher):
            self.launcher.procs.clear()

    def on_exception(self, exception: BaseException) -> None:
        """Closes the connections to the other ranks, which may be waiting for this one; saving needs none."""
        super().on_exception(exception)
        self._let_ranks_exit()
        if self._control_group is None or isinstance(exception, SIGTERMException):  # all ranks know
            return
        dist.destroy_process_group(self._control_group)
        self._control_group = None
        if self.root_device.type == "cpu":
            dist.destroy_process_group()
        else:
            self._abandoned = True

    def teardown(self) -> None:
        if self._abandoned:
            # Kernels that wait for a rank which is gone would hold up what frees memory, and the exit. All is saved
            # by now; earlier, an abort would free what another rank still reads. (Never run on a GPU.)
            _abort_process_group()
        if self._sigint_handler is not None:
            signal.signal(signal.SIGINT, self._sigint_handler)
            self._sigint_handler = None
        super().teardown()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The module's weights, exact; while an exception is handled as they are, since other ranks may be gone."""
        if self.optimizers and sys.exception() is None:
            self.optimizer.gather_exact()
        return super().lightning_module_state_dict()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """On every rank: each writes its own optimizer file."""
        self.checkpoint_io.save_checkpoint(checkpoint, filepath, storage_options=storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """The checkpoint with this rank's optimizer state, or that of all ranks where their number was another."""
        checkpoint = super().load_checkpoint(checkpoint_path, weights_only=weights_only)
        if "optimizer_shards" in checkpoint:
            checkpoint["optimizer_states"] = list(zip(*checkpoint.pop("optimizer_shards"), strict=True))
        return checkpoint


class _AwaitEvaluation(Callback):
    """Lets the ranks agree to the end of an evaluation, before its results are reduced."""

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        assert isinstance(trainer.strategy, Zero2MuonStrategy)
        trainer.strategy.await_evaluation()


StrategyRegistry.register(
    "zero2_muon",
    Zero2MuonStrategy,
    description="ZeRO-2 for MuonAdamW: gradients and optimizer state shared out among the ranks",
)
