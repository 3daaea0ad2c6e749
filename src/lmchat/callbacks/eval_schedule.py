"""When to evaluate."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from lmchat.types import UserError


class EvalSchedule(Callback):
    """Runs the validation loop at step 0, every ``every_n_steps`` optimizer steps and at the end.

    Args:
        every_n_steps: optimizer steps between evaluations; 0 evaluates at the start and at the end only.
        at_start: evaluate before the first step (never when a run is resumed).
        at_end: evaluate after the last step.
    """

    def __init__(self, every_n_steps: int = 250, at_start: bool = True, at_end: bool = True) -> None:
        if every_n_steps < 0:
            raise UserError(f"--eval.every_n_steps is {every_n_steps}; use 0 (only start and end) or more")
        self.every_n_steps = every_n_steps
        self.at_start = at_start
        self.at_end = at_end
        self._last_evaluated_step: int | None = None

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        if stage != "fit":
            return
        # Lightning counts micro-batches over the whole run when check_val_every_n_epoch is None.
        trainer.check_val_every_n_epoch = None
        trainer.val_check_interval = (self.every_n_steps * trainer.accumulate_grad_batches) or 2**62

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if self.at_start and trainer.global_step == 0:
            _run_validation(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            self._last_evaluated_step = trainer.global_step

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        complete = trainer.global_step >= trainer.max_steps
        if self.at_end and complete and self._last_evaluated_step != trainer.global_step:
            _run_validation(trainer)


def _run_validation(trainer: L.Trainer) -> None:
    """What Lightning's own training loop does when validation is due."""
    trainer.validating = True
    trainer.fit_loop.epoch_loop.val_loop.run()
    trainer.training = True
