"""Stops the run, or skips the step, when a loss or a gradient is NaN or infinite."""

from collections.abc import Callable
from typing import Any, Literal

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lmchat.checkpoint.meta_schema import COUNTER, check_state
from lmchat.optim.muon_adamw import are_finite
from lmchat.optim.sharded import ShardedMuonAdamW
from lmchat.strategies.zero2_muon import reduce_numbers
from lmchat.types import UserError

NOWHERE = 2**62
LARGE_WEIGHT = 100.0
"""Weights below do not overflow activations; trained ones rarely are above."""


class Diverged(UserError):
    """The weights after the last optimizer step are of no use; they are not saved."""


class NonFiniteGuard(Callback):
    """Prevents optimizer steps in which a micro-batch's loss, or the gradient, is not finite on any rank.

    The ranks agree once per step. On a GPU the losses are copied to the CPU while the last backward pass runs. If the
    last step leaves large weights, the loss of its last micro-batch is computed again, as no later step does it.

    Args:
        action: "stop" ends the run before that step; "skip" discards the step's gradients, counts it in
            ``train/skipped_steps`` and continues.
    """

    def __init__(self, action: Literal["stop", "skip"] = "stop") -> None:
        self.action = action
        self.skipped_steps = 0
        self._losses: list[Tensor] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._losses.clear()

    def on_before_backward(self, trainer: L.Trainer, pl_module: Any, loss: Tensor) -> None:
        self._losses.append(loss.detach())
        if len(self._losses) == trainer.accumulate_grad_batches:
            place = _first_non_finite(torch.stack(self._losses), trainer.global_rank, trainer.world_size)
            self._place = _read_later(place)
            self._losses.clear()

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        finding = self._finding(trainer, pl_module, optimizer)
        if finding is None:
            return
        if self.action == "stop":
            raise UserError(
                f"{finding}; the step was not taken: resume with a lower learning rate, or leave "
                "such steps out with --non_finite_guard.action skip"
            )
        # A sharded optimizer has gradients in buckets too.
        getattr(optimizer, "skip_step", optimizer.zero_grad)()
        self.skipped_steps += 1
        rank_zero_warn(f"{finding}: the step is skipped ({self.skipped_steps} so far)")
        for logger in trainer.loggers:
            logger.log_metrics({"train/skipped_steps": self.skipped_steps}, step=trainer.global_step + 1)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step < trainer.max_steps:
            return
        largest = torch.stack([weight.detach().norm(torch.inf) for weight in pl_module.parameters()]).max()
        is_large = torch.logical_not(largest <= LARGE_WEIGHT).long()  # or NaN
        if not int(reduce_numbers(trainer, is_large, dist.ReduceOp.MAX)):
            return
        loss = pl_module.training_step(batch, batch_idx).detach()
        pl_module.pop_step_loss()  # neither this loss nor its metrics belong to a step
        pl_module.pop_step_metrics()
        place = _first_non_finite(loss[None], trainer.global_rank, trainer.world_size)
        if int(reduce_numbers(trainer, place, dist.ReduceOp.MIN)) == NOWHERE:
            return
        finding = f"the loss is not finite after the last step, {trainer.global_step}"
        if self.action == "stop":
            raise Diverged(f"{finding}; the step is not saved: resume an earlier checkpoint with a lower learning rate")
        rank_zero_warn(f"{finding}: the run has diverged")

    def _finding(self, trainer: L.Trainer, module: L.LightningModule, optimizer: Optimizer) -> str | None:
        """Description of the non-finite loss or gradient, equal on all ranks; None if all are finite."""
        step = trainer.global_step + 1
        place = int(reduce_numbers(trainer, torch.tensor(self._place()), dist.ReduceOp.MIN))
        if place != NOWHERE:
            micro_batch, rank = divmod(place, trainer.world_size)
            return f"the loss is not finite at step {step}, in micro-batch {micro_batch} (from 0) of rank {rank}"
        if names := _non_finite_gradients(module, optimizer):
            more = f" and {len(names) - 1} more" if names[1:] else ""
            return f"the gradient is not finite at step {step}, of {names[0]}{more}, though every loss is"
        return None

    def state_dict(self) -> dict[str, Any]:
        return {"skipped_steps": self.skipped_steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        check_state(type(self), state_dict, {"skipped_steps": COUNTER})
        self.skipped_steps = state_dict["skipped_steps"]


def _non_finite_gradients(module: L.LightningModule, optimizer: Optimizer) -> list[str]:
    if isinstance(optimizer, ShardedMuonAdamW):  # its gradients may be in buckets
        return optimizer.non_finite_gradients()
    grads = {name: param.grad for name, param in module.named_parameters() if param.grad is not None}
    finite = are_finite([grad.sum() for grad in grads.values()])
    return [name.removeprefix("net.") for name, good in zip(grads, finite, strict=True) if not good]


def _first_non_finite(losses: Tensor, rank: int, world_size: int) -> Tensor:
    """Index k · W + r of the first non-finite loss: micro-batch k of rank r of W ranks; `NOWHERE` if all are finite."""
    places = torch.arange(len(losses), device=losses.device) * world_size + rank
    return torch.where(losses.isfinite(), NOWHERE, places).min()


def _read_later(number: Tensor) -> Callable[[], int]:
    """Starts copying a number to the CPU; returns a function that waits for it."""
    copy = number.to("cpu", non_blocking=True)
    if not number.is_cuda:
        return lambda: int(copy)
    copied = torch.cuda.Event()
    copied.record()

    def read() -> int:
        copied.synchronize()
        return int(copy)

    return read
