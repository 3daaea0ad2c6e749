"""A run that is killed and resumed through the command line equals an uninterrupted one bit for bit."""

from __future__ import annotations

import csv
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from forked import exit_statuses, lmchat, start
from lmchat.checkpoint.layout import committed_steps
from lmchat.checkpoint.load import find_checkpoint, load_model_state, load_rank_state
from tiny_fit import config_options, same

STEPS = 20
LATEST_KILL = 8  # long before the end, so that a run cannot finish before the signal
CONFIG = f"""
trainer: {{max_steps: {STEPS}}}
model: {{init_args: {{global_batch_tokens: 256}}}}
data: {{init_args: {{micro_batch_size: 4}}}}
monitor: {{every_n_steps: 1}}
eval: {{every_n_steps: 4}}
samples: {{max_new_tokens: 2}}
checkpoint: {{every_n_steps: 1}}
"""


def run(base: Path, *options: str, kill_at_step: int | None = None) -> None:
    """`lmchat fit` in a subprocess; with ``kill_at_step``, SIGKILL when that step's checkpoint exists."""
    output = base / "output.txt"
    arguments = ["fit", *config_options(base, CONFIG), *options]
    process = start(lmchat, *arguments, output=output, environment={"LMCHAT_BASE_DIR": str(base)})
    if kill_at_step is None:
        assert exit_statuses([process]) == [0], output.read_text()
        return
    awaited = base / "base_checkpoints" / "d2" / f"meta_{kill_at_step:06d}.json"
    deadline = time.monotonic() + 120
    while not awaited.exists() and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.002)
    process.kill()
    assert exit_statuses([process]) == [-signal.SIGKILL]
    assert awaited.exists()


def losses(base: Path) -> dict[int, str]:
    """Logged losses by step, of all runs in order; later runs repeat steps that an earlier one did not save."""
    found: dict[int, str] = {}
    for path in sorted(base.rglob("metrics.csv"), key=lambda path: path.stat().st_mtime):
        with path.open() as file:
            for row in csv.DictReader(file):
                if row.get("train/loss"):
                    step = int(row["step"])
                    assert found.setdefault(step, row["train/loss"]) == row["train/loss"], f"step {step} differs"
    return found


@pytest.fixture(scope="module")
def unbroken(new_base: Callable[[], Path]) -> Path:
    base = new_base()
    run(base)
    return base


@pytest.mark.parametrize("earliest_kill", [1, pytest.param(7, marks=pytest.mark.slow)])
def test_a_killed_run_resumes_exactly(earliest_kill: int, unbroken: Path, new_base: Callable[[], Path]) -> None:
    base = new_base()
    seed = time.time_ns()
    kill_at_step = random.Random(seed).randint(earliest_kill, LATEST_KILL)
    print(f"seed {seed}: killed once step {kill_at_step} is saved")
    run(base, kill_at_step=kill_at_step)
    last = committed_steps(base / "base_checkpoints" / "d2")[-1]
    assert kill_at_step <= last < STEPS
    run(base, "--ckpt_path", "last")
    expected = losses(unbroken)
    assert sorted(expected) == list(range(1, STEPS + 1))
    # A killed logger may lose its last lines; the others must agree, and the resumed part must be complete.
    resumed = losses(base)
    assert resumed.items() <= expected.items()
    assert set(range(last + 1, STEPS + 1)) <= set(resumed)
    checkpoints = [find_checkpoint(folder / "base_checkpoints" / "d2") for folder in (unbroken, base)]
    assert [checkpoint.step for checkpoint in checkpoints] == [STEPS, STEPS]
    assert same(*map(load_model_state, checkpoints))
    states = [load_rank_state(checkpoint, 0) for checkpoint in checkpoints]
    for name in ("optimizer_states", "rng", "FineWebDataModule"):
        assert same(states[0][name], states[1][name]), name
