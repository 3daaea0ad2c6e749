"""Shortens a run to its time budget."""

import time
from typing import Any

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lmchat.callbacks.step import StepCallback
from lmchat.checkpoint.meta_schema import COUNTER, check_state, optional
from lmchat.option_checks import check_count
from lmchat.strategies.lightning_internals import set_max_steps
from lmchat.types import UserError


class TimeBudget(StepCallback):
    """Lowers the number of steps on a machine that is too slow for all of them.

    In the first part of the run, in which the learning rate (without warmup) is constant, the duration is forecast from
    the steps after the first. ``max_steps`` is lowered if the forecast exceeds the budget, and raised again, at most to
    its original value, if a later forecast does not. Muon's weight decay, which depends on the length from the start,
    then falls faster, so a run is reproducible only if its steps were not lowered. A resumed run keeps the lowered
    number of steps.

    Args:
        minutes: maximum duration of training, counted from its first step.
        check_every_n_steps: optimizer steps between forecasts.
        until: fraction of the run after which the length is fixed.
    """

    def __init__(self, minutes: float, check_every_n_steps: int = 20, until: float = 0.4) -> None:
        check_count(None, 1, check_every_n_steps=check_every_n_steps)
        if not minutes > 0 or not 0 < until <= 1:
            raise UserError(
                f"TimeBudget's minutes are {minutes} and its until is {until}; use minutes above 0 and a share above 0"
            )
        self.minutes = minutes
        self.check_every_n_steps = check_every_n_steps
        self.until = until
        self.lowered_to: int | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        super().on_train_start(trainer, pl_module)
        if self.lowered_to is not None:
            set_max_steps(trainer, min(self.lowered_to, trainer.max_steps))
        self._start = time.perf_counter()
        self._first_step = trainer.global_step
        self._all_steps = trainer.max_steps

    def on_step_end(self, trainer: L.Trainer, pl_module: Any, step: int) -> None:
        now = time.perf_counter()
        done = step - self._first_step
        if done == 1:  # the first step includes the initial evaluation
            self._first_step_end = now
        if done == 1 or done % self.check_every_n_steps or step > self.until * trainer.max_steps:
            return
        per_step = (now - self._first_step_end) / (done - 1)
        # All ranks take the same steps.
        affordable = trainer.strategy.broadcast(step + int((60 * self.minutes - (now - self._start)) / per_step))
        # The steps taken so far stay in the constant phase of the learning rate.
        steps = min(max(affordable, int(step / self.until)), self._all_steps)
        if steps == trainer.max_steps:
            return
        rank_zero_warn(
            f"at {per_step:.2f} s per step, {self.minutes:g} minutes are enough for {steps} of {self._all_steps} steps"
        )
        self.lowered_to = steps
        set_max_steps(trainer, steps)

    def state_dict(self) -> dict[str, Any]:
        return {"lowered_to": self.lowered_to}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        check_state(type(self), state_dict, {"lowered_to": optional(COUNTER)})
        self.lowered_to = state_dict["lowered_to"]
