"""The callbacks that plan, evaluate and measure a run, in real runs."""

from __future__ import annotations

import csv
import gc
import math
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger

from lmchat.callbacks import gc_freeze
from lmchat.callbacks.checkpoint import StepCheckpoint
from lmchat.callbacks.evaluate import Evaluate
from lmchat.callbacks.gc_freeze import GCFreeze
from lmchat.callbacks.monitor import EMA_DECAY, Monitor
from lmchat.callbacks.training_plan import TrainingPlan
from lmchat.checkpoint.load import find_checkpoint
from lmchat.run_plan import accumulation_steps
from lmchat.scaling import make_plan
from lmchat.stages.pretrain import FineWebDataModule, PretrainModule
from lmchat.types import UserError

SMALL = {"depth": 1, "sequence_len": 32, "aspect_ratio": 32, "head_dim": 32, "window_pattern": "L"}


def train(
    base: Path,
    *callbacks: Callback,
    max_steps: int = 4,
    batch: int = 64,
    micro_batch_size: int = 1,
    ckpt_path: Path | None = None,
    log: str = "",
) -> L.Trainer:
    torch.manual_seed(1)
    module = PretrainModule(**SMALL, global_batch_tokens=batch)
    data = FineWebDataModule(micro_batch_size=micro_batch_size, eval_tokens=32 * micro_batch_size)
    data.spec = module.spec()
    run = L.Trainer(
        accelerator="cpu",
        max_epochs=-1,
        max_steps=max_steps,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(callback, StepCheckpoint) for callback in callbacks),
        callbacks=[TrainingPlan(), *callbacks],
        logger=CSVLogger(base / "logs", name="test", version=log),
    )
    run.fit(module, data, ckpt_path=ckpt_path)
    return run


def records(run: L.Trainer) -> list[dict[str, str]]:
    """Log records of the training steps."""
    with (Path(run.loggers[0].log_dir) / "metrics.csv").open() as file:
        return [row for row in csv.DictReader(file) if row["train/loss"]]


class Watch(Callback):
    """Records the step of every validation, the micro-batches of every step, and the collector's state after them."""

    def __init__(self) -> None:
        self.validated: list[int] = []
        self.micro_batches: Counter[int] = Counter()
        self.collector: dict[int, tuple[bool, bool]] = {}

    def on_validation_start(self, trainer: L.Trainer, *_: Any) -> None:
        self.validated.append(trainer.global_step)

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self.micro_batches[trainer.global_step + 1] += 1

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.collector[trainer.global_step] = gc.isenabled(), gc.get_freeze_count() > 0


@pytest.mark.parametrize(
    ("every", "steps", "expected"), [(2, 5, [0, 2, 4, 5]), (2, 4, [0, 2, 4]), (0, 3, [0, 3]), (10, 3, [0, 3])]
)
def test_evaluation_runs_at_the_start_at_intervals_and_at_the_end(
    every: int, steps: int, expected: list[int], base: Path
) -> None:
    watch = Watch()
    train(base, Evaluate(every), watch, max_steps=steps)
    assert watch.validated == expected


def test_the_final_evaluation_does_not_depend_on_the_interval(base: Path) -> None:
    """Step 4 is on the schedule, but the loop was prevented from evaluating it."""

    class NoEvaluationInTheLoop(Callback):
        def on_train_start(self, trainer: L.Trainer, *_: Any) -> None:
            trainer.val_check_batch = 2**62

    watch = Watch()
    train(base, Evaluate(2), watch, NoEvaluationInTheLoop(), max_steps=4)
    assert watch.validated == [0, 4]


@pytest.mark.parametrize(("before", "after"), [(8, 2), (2, 8)])
def test_a_run_resumed_with_another_micro_batch_size_takes_the_same_steps(before: int, after: int, base: Path) -> None:
    """A step has 8 rows. Losses differ only by the order of summation, which accumulates over the steps."""
    unbroken_watch, watch = Watch(), Watch()
    options: dict[str, Any] = {"batch": 256, "max_steps": 5}
    unbroken = train(base, Monitor(1), Evaluate(2), unbroken_watch, **options, micro_batch_size=before, log="a")

    class Stop(Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            trainer.should_stop = trainer.global_step == 3

    checkpoints = base / "checkpoints"
    train(base, Stop(), StepCheckpoint(str(checkpoints)), **options, micro_batch_size=before, log="b")
    start = find_checkpoint("last", directory=checkpoints)
    assert start.step == 3
    resumed = train(
        base,
        Monitor(1),
        Evaluate(2),
        watch,
        StepCheckpoint(str(checkpoints)),
        **options,
        micro_batch_size=after,
        ckpt_path=start.paths.meta,
        log="c",
    )
    assert unbroken_watch.micro_batches == dict.fromkeys(range(1, 6), 8 // before)
    assert watch.micro_batches == dict.fromkeys(range(4, 6), 8 // after)
    assert unbroken_watch.validated == [0, 2, 4, 5]
    assert watch.validated == [4, 5]
    expected = {int(row["step"]): float(row["train/loss"]) for row in records(unbroken)}
    actual = {int(row["step"]): float(row["train/loss"]) for row in records(resumed)}
    assert actual == pytest.approx({step: expected[step] for step in range(4, 6)}, rel=1e-4)
    assert find_checkpoint("last", directory=checkpoints).step == 5


@pytest.fixture
def collections(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Entries for collections, which are left out: they would visit all objects of this process."""
    calls: list[None] = []
    monkeypatch.setattr(gc_freeze, "gc", SimpleNamespace(**{**vars(gc), "collect": lambda: calls.append(None)}))
    return calls


@pytest.mark.usefixtures("collections")
def test_gc_freezes_after_the_first_step_of_a_resumed_run(base: Path) -> None:
    gc.unfreeze()
    checkpoints = base / "checkpoints"
    train(base, StepCheckpoint(str(checkpoints)), max_steps=2)

    class AfterEachMicroBatch(Callback):
        def __init__(self) -> None:
            self.frozen: list[bool] = []

        def on_train_batch_end(self, *_: Any) -> None:
            self.frozen.append(gc.get_freeze_count() > 0)

    watch = AfterEachMicroBatch()
    start = find_checkpoint("last", directory=checkpoints).paths.meta
    train(base, GCFreeze(), watch, StepCheckpoint(str(checkpoints)), max_steps=4, ckpt_path=start)
    assert watch.frozen == [False, True, True, True]


@pytest.mark.parametrize(("callback", "flag"), [(Monitor, "--monitor"), (GCFreeze, "--gc_freeze")])
@pytest.mark.parametrize("steps", [0, -1])
def test_intervals_must_be_positive(callback: type, flag: str, steps: int) -> None:
    with pytest.raises(UserError, match=f"{flag}.every_n_steps is {steps}; it must be at least 1"):
        callback(every_n_steps=steps)


def test_the_collector_is_off_during_training_and_restored_after(base: Path, collections: list[None]) -> None:
    assert gc.isenabled()
    gc.unfreeze()
    watch = Watch()
    train(base, GCFreeze(every_n_steps=2), watch)
    assert watch.collector[1] == (False, True)
    assert watch.collector[4] == (False, True)
    assert len(collections) == 3, "after steps 1, 2 and 4"
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


@pytest.mark.usefixtures("collections")
def test_the_collector_is_restored_after_an_exception(base: Path) -> None:
    class Failure(Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step == 2:
                raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        train(base, GCFreeze(), Failure())
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_depth_alone_decides_the_plan(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = PretrainModule(**SMALL)
    data = FineWebDataModule(micro_batch_size=1, eval_tokens=64)
    trainer = L.Trainer(accelerator="cpu", max_epochs=-1, logger=False, enable_checkpointing=False)
    trainer.strategy.connect(module)
    data.trainer = module.trainer = trainer
    trainer.datamodule = data
    data.spec = module.spec()
    TrainingPlan(tokens_per_parameter=8).setup(trainer, module, "fit")
    plan = make_plan(**SMALL, vocab_size=512, ratio=8)
    assert trainer.max_steps == plan.steps > 0
    assert module.plan.global_batch_tokens == plan.global_batch_tokens
    assert trainer.accumulate_grad_batches * 32 == plan.global_batch_tokens
    assert math.isclose(module.plan.lr_scale, math.sqrt(plan.global_batch_tokens / 2**19))
    assert module.plan.weight_decay == plan.weight_decay
    groups = {group["name"]: group for group in module_with_network(module).configure_optimizers().param_groups}
    assert math.isclose(groups["x0_lambdas"]["lr"], 0.5 * module.plan.lr_scale)


def module_with_network(module: PretrainModule) -> PretrainModule:
    module.configure_model()
    return module


def test_explicit_options_are_kept(base: Path) -> None:
    run = train(base, max_steps=3, batch=128)
    assert run.global_step == 3
    assert run.accumulate_grad_batches == 4


@pytest.mark.parametrize(("tokens", "rows", "world", "expected"), [(64, 1, 1, 2), (64, 1, 2, 1), (3072, 8, 3, 4)])
def test_accumulation_fills_the_batch(tokens: int, rows: int, world: int, expected: int) -> None:
    assert accumulation_steps(tokens, rows, 32, world) == expected


def test_an_indivisible_batch_is_refused_with_valid_sizes() -> None:
    with pytest.raises(UserError, match=r"96 is not a multiple.*micro_batch_size 1 or.*64 or.*128"):
        accumulation_steps(96, 2, 32, 1)


def test_the_monitor_logs_what_it_prints(base: Path) -> None:
    run = train(base, Monitor(every_n_steps=1), max_steps=5)
    rows = records(run)
    assert [int(row["step"]) for row in rows] == [1, 2, 3, 4, 5]
    ema = 0.0
    for number, row in enumerate(rows, start=1):
        ema = EMA_DECAY * ema + (1 - EMA_DECAY) * float(row["train/loss"])
        assert math.isclose(float(row["train/loss_ema"]), ema / (1 - EMA_DECAY**number), rel_tol=1e-5)
        assert float(row["train/tokens"]) == 64 * number
        assert math.isclose(float(row["train/tokens_per_second"]), 64e3 / float(row["train/step_ms"]), rel_tol=1e-6)
        assert "train/mfu" not in row  # on a CPU
        assert float(row["train/memory_gb"]) > 0.01
    assert [float(row["train/lr_multiplier"]) for row in rows[-2:]] == [1.0, 0.5]
    assert float(rows[-1]["train/eta_seconds"]) == 0


def test_the_monitor_follows_changes_of_max_steps(base: Path, capfd: pytest.CaptureFixture[str]) -> None:
    class Shorten(Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step == 2:
                trainer.fit_loop.epoch_loop.max_steps = 5

    run = train(base, Monitor(every_n_steps=4), Shorten(), max_steps=20)
    rows = records(run)
    assert [int(row["step"]) for row in rows] == [1, 4, 5]
    assert float(rows[-1]["train/eta_seconds"]) == 0
    assert "step 5/5 |" in capfd.readouterr().out


def test_time_after_an_evaluation_is_not_training_time(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]

    class Slow(Callback):
        """A slow callback, set up after the monitor, like `Samples`."""

        def on_validation_end(self, *_: Any) -> None:
            clock[0] += 100

        def on_train_batch_end(self, *_: Any) -> None:
            clock[0] += 0.5

    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    rows = records(train(base, Monitor(every_n_steps=1), Slow(), Evaluate(2, at_start=False), max_steps=4))
    assert [float(row["train/step_ms"]) for row in rows[1:]] == [1000] * 3
