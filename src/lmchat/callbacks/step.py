"""Callbacks that act at the end of optimizer steps."""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback


class StepCallback(Callback):
    """Calls `on_step_end` once after each optimizer step, not after each micro-batch.

    Subclasses that override ``on_train_start`` or ``on_train_batch_end`` must call the base class's hook.
    """

    _last_step = 0

    def on_step_end(self, trainer: L.Trainer, pl_module: Any, step: int) -> None:
        """Called after the micro-batch that completed optimizer step ``step``, counted from 1."""
        raise NotImplementedError

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._last_step = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.global_step != self._last_step:
            self._last_step = trainer.global_step
            self.on_step_end(trainer, pl_module, self._last_step)
