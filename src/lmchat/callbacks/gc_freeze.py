"""No garbage-collection pauses in the training loop."""

from __future__ import annotations

import gc
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from lmchat.types import UserError


class GCFreeze(Callback):
    """Collects, freezes and disables the garbage collector after the first step of a run; collects every so many steps.

    A collection walks every object alive, some 0.5 s with a compiled model, and stalls all ranks. After the first step
    the long-lived objects exist: they are frozen, and what little cyclic garbage the loop makes is collected by hand.
    The collector is put back as it was when training ends, also by an exception.

    Args:
        every_n_steps: optimizer steps between collections.
    """

    def __init__(self, every_n_steps: int = 5000) -> None:
        if every_n_steps < 1:
            raise UserError(f"--gc_freeze.every_n_steps is {every_n_steps}; use 1 or more")
        self.every_n_steps = every_n_steps
        self._was_enabled: bool | None = None

    def on_train_start(self, trainer: L.Trainer, *_: Any) -> None:
        self._last_step = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        step = trainer.global_step
        if step == self._last_step:
            return
        self._last_step = step
        if self._was_enabled is None:
            self._was_enabled = gc.isenabled()
            gc.collect()
            gc.freeze()
            gc.disable()
        elif step % self.every_n_steps == 0:
            gc.collect()

    def _restore(self) -> None:
        if self._was_enabled is None:
            return
        gc.unfreeze()
        if self._was_enabled:
            gc.enable()
        gc.collect()
        self._was_enabled = None

    def on_train_end(self, *_: Any) -> None:
        self._restore()

    def on_exception(self, *_: Any) -> None:
        self._restore()
