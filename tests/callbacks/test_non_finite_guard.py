"""Steps with a non-finite loss are not taken: the run stops before them or skips them."""

from __future__ import annotations

import csv
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from lmchat.__main__ import main
from lmchat.callbacks.monitor import EMA_DECAY
from lmchat.callbacks.non_finite_guard import NOWHERE, _first_non_finite
from lmchat.checkpoint.layout import CheckpointPaths, committed_steps
from lmchat.checkpoint.load import find_checkpoint, load_model_state
from lmchat.model.gpt import GPT

CONFIG = """
trainer: {accelerator: cpu, devices: 1, max_steps: 4}
model:
  class_path: PretrainModule
  init_args: {depth: 1, sequence_len: 32, head_dim: 32, window_pattern: L, global_batch_tokens: 128}
data: {class_path: FineWebDataModule, init_args: {micro_batch_size: 2, eval_tokens: 256, buffer_size: 20}}
eval: {every_n_steps: 0, at_start: false, at_end: false}
monitor: {every_n_steps: 1}
samples: {max_new_tokens: 0}
checkpoint: {every_n_steps: %s}
"""


PLACES = {
    "loss": r"the loss is not finite at step 3, in micro-batch 1 \(from 0\) of rank 0",
    "gradient": r"the gradient is not finite at step 3, of [\w.]+ and \d+ more",
}
CASES = [
    ("loss", "PretrainModule"),
    ("gradient", "own_optimizer.AdamWModule"),
    pytest.param("loss", "own_optimizer.AdamWModule", marks=pytest.mark.slow),
    pytest.param("gradient", "PretrainModule", marks=pytest.mark.slow),
]


def train(
    base: Path,
    monkeypatch: pytest.MonkeyPatch,
    what: str,
    every_n_steps: int,
    *options: str,
    module: str = "PretrainModule",
) -> int:
    """Exit status of 4 steps of 2 micro-batches; the loss or gradient of micro-batch 5 (from 0) is NaN."""
    compute, calls = GPT.loss, iter(range(100))

    def loss(self: GPT, *args: Any, **kwargs: Any) -> torch.Tensor:
        value = compute(self, *args, **kwargs)
        if next(calls) != 5:
            return value
        if what == "loss":
            return value * torch.nan
        value.register_hook(lambda grad: grad * torch.nan)
        return value

    monkeypatch.setattr(GPT, "loss", loss)
    (base / "tiny.yaml").write_text((CONFIG % every_n_steps).replace("PretrainModule", module))
    return main(["fit", "--config", str(base / "tiny.yaml"), *options])


@pytest.mark.parametrize(("what", "module"), CASES)
def test_by_default_the_run_stops_and_saves_the_previous_step(
    what: str, module: str, base: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert train(base, monkeypatch, what, 100, module=module) == 2
    assert re.search(PLACES[what], capfd.readouterr().err)
    folder = base / "base_checkpoints" / "d1"
    assert committed_steps(folder) == [2]
    assert all(tensor.isfinite().all() for tensor in load_model_state(find_checkpoint(folder)).values())
    monkeypatch.undo()
    monkeypatch.setenv("LMCHAT_BASE_DIR", str(base))
    assert main(["fit", "--config", str(base / "tiny.yaml"), "--ckpt_path", "last"]) == 0
    assert committed_steps(folder) == [2, 4]


@pytest.mark.parametrize(("what", "module"), CASES)
def test_non_finite_steps_can_be_skipped_and_are_counted(
    what: str, module: str, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train(base, monkeypatch, what, 1, "--non_finite_guard.action", "skip", module=module) == 0
    folder = base / "base_checkpoints" / "d1"
    weights = [load_model_state(find_checkpoint(CheckpointPaths(folder, step).meta)) for step in (1, 2, 3, 4)]
    unchanged = [all(torch.equal(a[name], b[name]) for name in a) for a, b in pairwise(weights)]
    assert unchanged == [False, True, False]
    (path,) = (base / "logs").rglob("metrics.csv")
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["step"], row["train/skipped_steps"]) for row in rows if row["train/skipped_steps"]] == [("3", "1")]
    losses = {row["step"]: (row["train/loss"], row["train/loss_ema"]) for row in rows if row["train/loss"]}
    counted = "421" if what == "loss" else "4321"
    assert (losses["3"] == ("nan", losses["2"][1])) == (what == "loss")
    ema = sum((1 - EMA_DECAY) * EMA_DECAY**age * float(losses[step][0]) for age, step in enumerate(counted))
    assert float(losses["4"][1]) == pytest.approx(ema / (1 - EMA_DECAY ** len(counted)), rel=1e-5)


@pytest.mark.parametrize(("action", "status", "steps"), [("stop", 2, []), ("skip", 0, [1])])
def test_a_divergence_in_the_last_step_ends_the_run_and_is_not_saved(
    action: str,
    status: int,
    steps: list[int],
    base: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    options = ["--model.matrix_lr=1e30", "--trainer.max_steps=1", "--non_finite_guard.action", action]
    assert train(base, monkeypatch, "loss", 1, *options) == status
    message = (
        "lmchat: the loss is not finite after the last step, 1; the step is not saved: resume an earlier checkpoint"
    )
    assert (message in capfd.readouterr().err) == bool(status)
    assert committed_steps(base / "base_checkpoints" / "d1") == steps


@pytest.mark.parametrize(
    ("losses", "rank", "world_size", "expected"),
    [
        ([1.0, 2.0], 0, 1, NOWHERE),
        ([1.0, torch.inf, torch.nan], 0, 1, 1),
        ([torch.nan, 1.0], 2, 3, 2),
        ([1.0, -torch.inf], 1, 4, 5),
    ],
)
def test_micro_batches_are_counted_over_all_ranks(
    losses: list[float], rank: int, world_size: int, expected: int
) -> None:
    assert int(_first_non_finite(torch.tensor(losses), rank, world_size)) == expected
