"""A run that fits into the time there is."""

from __future__ import annotations

import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lmchat.types import UserError


class TimeBudget(Callback):
    """Takes fewer steps on a machine too slow for all of them; on any other it changes nothing.

    In the first part of the run, where the learning rate (without warmup) does not depend on its length, the rest is
    forecast from the steps after the first. ``max_steps`` is lowered where the forecast is over the budget, and raised
    again, up to what it was, where a later one is not. Muon's weight decay, which does depend on the length from the
    start, falls faster from there on. A run is reproducible as long as that does not happen; what was lowered stays so
    in a resumed run.

    Args:
        minutes: time that training may take, counted from its first step.
        check_every_n_steps: optimizer steps between forecasts.
        until: share of the run after which nothing is changed any more.
    """

    def __init__(self, minutes: float, check_every_n_steps: int = 20, until: float = 0.4) -> None:
        if check_every_n_steps < 1:
            raise UserError(f"TimeBudget's check_every_n_steps is {check_every_n_steps}; use 1 or more")
        if not minutes > 0 or not 0 < until <= 1:
            raise UserError(
                f"TimeBudget's minutes are {minutes} and its until is {until}; use minutes above 0 and a share above 0"
            )
        self.minutes = minutes
        self.check_every_n_steps = check_every_n_steps
        self.until = until
        self.lowered_to: int | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if self.lowered_to is not None:
            _set_max_steps(trainer, min(self.lowered_to, trainer.max_steps))
        self._start = time.perf_counter()
        self._first_step = self._last_step = trainer.global_step
        self._most_steps = trainer.max_steps

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        step, now = trainer.global_step, time.perf_counter()
        if step == self._last_step:
            return
        self._last_step = step
        done = step - self._first_step
        if done == 1:
            # It bore the evaluation before it, which the others will not.
            self._first_step_end = now
        if done == 1 or done % self.check_every_n_steps or step > self.until * trainer.max_steps:
            return
        per_step = (now - self._first_step_end) / (done - 1)
        affordable = step + int((60 * self.minutes - (now - self._start)) / per_step)
        # All ranks take the same steps.
        affordable = trainer.strategy.broadcast(affordable)
        # A part that is over stays within `until`, so that no learning rate was other than it would have been.
        steps = min(max(affordable, int(step / self.until)), self._most_steps)
        if steps == trainer.max_steps:
            return
        rank_zero_warn(
            f"at {per_step:.2f} s per step, {self.minutes:g} minutes are enough for {steps} of {self._most_steps} steps"
        )
        self.lowered_to = steps
        _set_max_steps(trainer, steps)

    def state_dict(self) -> dict[str, Any]:
        return {"lowered_to": self.lowered_to}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.lowered_to = state_dict["lowered_to"]


def _set_max_steps(trainer: L.Trainer, steps: int) -> None:
    trainer.fit_loop.epoch_loop.max_steps = steps
