"""Keeps garbage collection out of the training loop."""

import gc
from typing import Any

import lightning as L

from lmchat.callbacks.step import StepCallback
from lmchat.option_checks import check_count


class GCFreeze(StepCallback):
    """Freezes and disables the garbage collector after the first step; collects every ``every_n_steps`` steps.

    A collection visits every live object, takes about 0.5 s with a compiled model and stalls all ranks. Long-lived
    objects exist after the first step and are frozen then. The collector is restored when training ends, also after an
    exception.

    Args:
        every_n_steps: optimizer steps between collections.
    """

    def __init__(self, every_n_steps: int = 5000) -> None:
        check_count("gc_freeze", 1, every_n_steps=every_n_steps)
        self.every_n_steps = every_n_steps
        self._was_enabled: bool | None = None

    def on_step_end(self, trainer: L.Trainer, pl_module: Any, step: int) -> None:
        if self._was_enabled is None:
            self._was_enabled = gc.isenabled()
            gc.collect()
            gc.freeze()
            gc.disable()
        elif step % self.every_n_steps == 0:
            gc.collect()

    def on_train_end(self, *_: Any) -> None:
        if self._was_enabled is None:
            return
        gc.unfreeze()
        if self._was_enabled:
            gc.enable()
        self._was_enabled = None

    def on_exception(self, *_: Any) -> None:
        self.on_train_end()
