from __future__ import annotations

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from lmchat.demo import time_budget
from lmchat.demo.time_budget import TimeBudget
from lmchat.types import UserError

ACCUMULATION = 2


class Line(L.LightningModule):
    """A regression whose micro-batches advance a mock clock."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.clock = clock

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        self.clock.now += self.clock.seconds_per_step / ACCUMULATION
        return self.layer(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Clock:
    def __init__(self, seconds_per_step: float) -> None:
        self.now = 100.0
        self.seconds_per_step = seconds_per_step

    def perf_counter(self) -> float:
        return self.now


def steps_taken(
    monkeypatch: pytest.MonkeyPatch, seconds_per_step: float, budget: TimeBudget, max_steps: int = 100
) -> int:
    clock = Clock(seconds_per_step)
    monkeypatch.setattr(time_budget, "time", clock)
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=max_steps,
        max_epochs=-1,
        accumulate_grad_batches=ACCUMULATION,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[budget],
    )
    trainer.fit(Line(clock), DataLoader(torch.ones(1000, 1), batch_size=1))
    return trainer.global_step


def test_a_fast_machine_takes_all_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    budget = TimeBudget(minutes=1, check_every_n_steps=5)
    assert steps_taken(monkeypatch, 0.5, budget) == 100
    assert budget.lowered_to is None


def test_a_slow_machine_takes_fewer_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    budget = TimeBudget(minutes=1, check_every_n_steps=5)
    with pytest.warns(UserWarning, match="1 minutes are enough for 60 of 100 steps"):
        assert steps_taken(monkeypatch, 1.0, budget) == 60


def test_steps_are_raised_again_after_a_slow_start(monkeypatch: pytest.MonkeyPatch) -> None:
    class SlowStart(TimeBudget):
        def on_train_batch_end(self, trainer: L.Trainer, *args: object) -> None:
            super().on_train_batch_end(trainer, *args)
            if trainer.global_step == 5:
                assert trainer.max_steps == 60
                trainer.lightning_module.clock.seconds_per_step = 0.1

    budget = SlowStart(minutes=1, check_every_n_steps=5)
    with pytest.warns(UserWarning, match="enough for 60 of 100 steps"):
        assert steps_taken(monkeypatch, 1.0, budget) == 100


def test_the_initial_evaluation_is_not_part_of_the_forecast(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class EvaluatedStart(TimeBudget):
        def on_train_start(self, trainer: L.Trainer, pl_module: Line) -> None:
            super().on_train_start(trainer, pl_module)
            pl_module.clock.now += 20

    budget = EvaluatedStart(minutes=1, check_every_n_steps=5)
    assert steps_taken(monkeypatch, 0.35, budget) == 100
    assert budget.lowered_to is None


def test_steps_so_far_stay_in_the_constant_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five steps are 40 % of twelve: with fewer steps, the learning rate would have fallen already."""
    budget = TimeBudget(minutes=1, check_every_n_steps=5, until=0.4)
    with pytest.warns(UserWarning, match="enough for 12 of 100 steps"):
        assert steps_taken(monkeypatch, 30.0, budget) == 12


def test_a_resumed_run_keeps_the_lowered_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    budget = TimeBudget(minutes=1)
    budget.load_state_dict({"lowered_to": 30})
    assert steps_taken(monkeypatch, 0.0, budget) == 30
    assert budget.state_dict() == {"lowered_to": 30}


def test_the_interval_must_be_positive() -> None:
    with pytest.raises(UserError, match="check_every_n_steps is 0; it must be at least 1"):
        TimeBudget(minutes=1, check_every_n_steps=0)
