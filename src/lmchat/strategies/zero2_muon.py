"""`--trainer.strategy zero2_muon`: many processes train what one trains, with the optimizer's state shared out."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, Literal

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.overrides.distributed import _sync_module_states
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from torch import Tensor

from lmchat.optim.muon_adamw import MuonAdamW
from lmchat.optim.sharded import ShardedMuonAdamW
from lmchat.strategies.checkpoint_io import LMChatCheckpointIO
from lmchat.types import UserError


class Zero2MuonStrategy(DDPStrategy):
    """Replicated parameters, sharded gradients and optimizer state: `ShardedMuonAdamW` in place of the MuonAdamW.

    The module is not wrapped, so accumulation needs no communication; reductions start in the backward pass of the
    micro-batch that ends a step. Every rank saves its own optimizer file, and any number of ranks can resume.

    SIGTERM on any rank ends training on all ranks after the step in which they learn of it. Lightning would ask at
    every micro-batch, and broadcast from within the signal handler, between this step's collectives.

    Args:
        gather_dtype: in which new parameters travel; "auto" is bf16 where the network computes in bf16.
        bucket_mebibytes: size of a message of gradients.
        kwargs: as of `DDPStrategy`, e.g. ``process_group_backend``, ``timeout``.
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
        self._sigterm_here = False
        self._sigterm_anywhere: Callable[[], bool] | None = None

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
        plain = self.optimizers[0]
        self.optimizers = [
            ShardedMuonAdamW(
                plain.param_groups,
                gather_dtype=self._narrow_gather_dtype(),
                bucket_bytes=self._bucket_bytes,
                polar_dtype=plain.polar_dtype,
                compile=plain.compile,
            )
        ]
        self._take_over_sigterm(trainer)

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
            self._sigterm_anywhere = self._ask_for_sigterm()
            self.optimizer.reduce_during_backward()

    def optimizer_step(self, *args: Any, **kwargs: Any) -> Any:
        output = super().optimizer_step(*args, **kwargs)
        if self._sigterm_anywhere is not None and self._sigterm_anywhere():
            assert self.lightning_module is not None
            # Lightning raises SIGTERMException at the end of this batch.
            self.lightning_module.trainer._signal_connector.received_sigterm = True
        self._sigterm_anywhere = None
        return output

    def _take_over_sigterm(self, trainer: L.Trainer) -> None:
        # A group of its own on the CPU: asking neither waits for the device nor gets in between its collectives.
        self._control_group = dist.new_group(backend="gloo")
        trainer._signal_connector._sigterm_notifier_fn = self._on_sigterm  # type: ignore[method-assign]
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]

    def _on_sigterm(self, signum: int | signal.Signals, _: FrameType | None) -> None:
        if not self._sigterm_here and self.launcher is not None:
            self.launcher.kill(signal.Signals(signum))
        self._sigterm_here = True

    def _ask_for_sigterm(self) -> Callable[[], bool]:
        flag = torch.tensor([int(self._sigterm_here)])
        work = dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._control_group, async_op=True)

        def anywhere() -> bool:
            work.wait()
            return bool(flag.item())

        return anywhere

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


StrategyRegistry.register(
    "zero2_muon",
    Zero2MuonStrategy,
    description="ZeRO-2 for MuonAdamW: gradients and optimizer state shared out among the ranks",
)
