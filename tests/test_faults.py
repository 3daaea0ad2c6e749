"""Runs of two processes with a fault on one: both exit with the right status, and no step is lost."""

from __future__ import annotations

import csv
import os
import re
from pathlib import Path

import pytest

from forked import free_port, start
from killable_fit import _fit, start_fit
from lmchat.checkpoint.layout import CheckpointPaths, committed_steps
from lmchat.checkpoint.load import find_checkpoint, load_model_state, load_rank_state
from tiny_fit import same

STEPS, RANKS, ACCUMULATE = 6, 2, 2
EVAL_BATCHES = 4
CONFIG = """
trainer: {{accelerator: cpu, devices: 2, strategy: zero2_muon, max_steps: 6, callbacks: [{fault}]}}
model:
  class_path: PretrainModule
  init_args:  # fp32: what is saved without the other ranks has their weights as bf16 rounds them, beside the exact ones
    {{depth: 2, sequence_len: 32, aspect_ratio: 32, head_dim: 32, window_pattern: SL, global_batch_tokens: 256,
     compute_dtype: fp32}}
data:
  class_path: FineWebDataModule
  init_args: {{micro_batch_size: 2, eval_tokens: 512, buffer_size: 20}}
eval: {{every_n_steps: 3}}
monitor: {{every_n_steps: 1}}
samples: {{max_new_tokens: 0}}
checkpoint: {{every_n_steps: {every_n_steps}}}
"""


def run(base: Path, tiny_base: Path, fault: str = "", options: tuple[str, ...] = (), every_n_steps: int = 100) -> list:
    """Exit statuses of the ranks."""
    for name in ("base_data", "tokenizer"):
        if not (base / name).exists():
            (base / name).symlink_to(tiny_base / name)
    config = base / "tiny.yaml"
    config.write_text(CONFIG.format(fault=fault, every_n_steps=every_n_steps))
    ranks = start_fit(["--config", str(config), *options], base, RANKS)
    for rank in ranks:
        rank.join(250)
    hanging = [rank for rank in ranks if rank.is_alive()]
    for rank in hanging:
        rank.kill()
    assert not hanging, output(base)
    return [rank.exitcode for rank in ranks]


def output(base: Path) -> str:
    return "\n".join(path.read_text()[-4000:] for path in sorted(base.glob("output_rank*.txt")))


@pytest.fixture(scope="module")
def unbroken(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an undisturbed run with a checkpoint of every step."""
    base = tmp_path_factory.mktemp("unbroken")
    assert run(base, tiny_base, every_n_steps=1) == [0, 0], output(base)
    return base / "base_checkpoints" / "d2"


def assert_saved(base: Path, step: int, unbroken: Path, newest: bool = True) -> None:
    """Asserts that the checkpoint of a step, by default the newest, equals that of the undisturbed run."""
    folder = base / "base_checkpoints" / "d2"
    assert step in committed_steps(folder)[-1 if newest else 0 :], output(base)
    ours, theirs = (find_checkpoint(CheckpointPaths(each, step).meta) for each in (folder, unbroken))
    assert same(load_model_state(ours), load_model_state(theirs))
    for rank in range(RANKS):
        states = [load_rank_state(checkpoint, rank) for checkpoint in (ours, theirs)]
        # Without the optimizer's settings, which the interrupted step has already set.
        moments = [state["optimizer_states"][0]["state"] for state in states]
        assert same(*moments)
        for name in ("rng", "FineWebDataModule"):
            assert same(states[0][name], states[1][name]), name


FAULTS = {
    # fault, rank, hook, number of the call; exit statuses, and saved step
    "preemption": ("SIGTERM", 1, "on_train_batch_start", 5, [143, 143], 3),
    "SLURM's warning": ("SIGUSR1", 0, "on_before_backward", 3, [143, 143], 2),
    "Ctrl-C": ("SIGINT", 0, "on_train_batch_start", 2, [130, 130], 2),
    "preemption while evaluating": ("SIGTERM", 1, "on_validation_batch_start", EVAL_BATCHES + 2, [143, 143], 3),
    "error in the forward pass": ("error", 1, "on_train_batch_start", 4, [1, 1], 2),
    "error in the backward pass": ("out of memory", 0, "on_after_backward", 5, [2, 1], 2),
    "error while evaluating": ("error", 1, "on_validation_batch_start", EVAL_BATCHES + 2, [1, 1], 3),
}


QUICK = ("preemption while evaluating", "error in the backward pass")


@pytest.mark.parametrize(
    "case", [case if case in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in FAULTS]
)
def test_a_fault_on_one_rank_ends_all_ranks_without_losing_a_step(
    case: str, unbroken: Path, tiny_base: Path, tmp_path: Path
) -> None:
    deed, rank, hook, count, statuses, step = FAULTS[case]
    arguments = f"{{deed: {deed}, rank: {rank}, hook: {hook}, count: {count}}}"
    fault = f"{{class_path: faults.Fault, init_args: {arguments}}}"
    assert run(tmp_path, tiny_base, fault) == statuses, output(tmp_path)
    assert_saved(tmp_path, step, unbroken)


@pytest.mark.slow
def test_a_slurm_signal_saves_and_ends_the_run(unbroken: Path, tiny_base: Path, tmp_path: Path) -> None:
    """In srun's environment. Lightning alone would save within the handler, elsewhere, and call scontrol."""
    for name in ("base_data", "tokenizer"):
        (tmp_path / name).symlink_to(tiny_base / name)
    fault = "{class_path: faults.Fault, init_args: {deed: SIGUSR1, rank: 1, hook: on_train_batch_start, count: 3}}"
    config = tmp_path / "tiny.yaml"
    config.write_text(CONFIG.format(fault=fault, every_n_steps=100))
    port = free_port()
    job = {"SLURM_JOB_ID": "4242", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}
    job |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LMCHAT_BASE_DIR": str(tmp_path)}
    ranks = []
    for rank in range(RANKS):
        environment = {**job, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_NODEID": "0"}
        log = tmp_path / f"output_rank{rank}.txt"
        ranks.append(start(_fit, ["--config", str(config)], output=log, environment=environment))
    for process in ranks:
        process.join(250)
    assert [process.exitcode for process in ranks] == [143, 143], output(tmp_path)
    assert_saved(tmp_path, 2, unbroken)


FULL_DISK = r"optim_00000[23]_rank{rank}.pt: File too large; free some space|model_00000[23].pt: File too large; free"
READ_ONLY = r"{file}: Read-only file system; make the folder writable or choose another one"
UNWRITABLE = {
    # fault, rank, hook, number of the call; exit statuses, and message
    ("full disk", 0, "on_train_batch_start", 5): ([2, 1], FULL_DISK.format(rank=0)),
    ("full disk", 1, "on_train_batch_start", 5): ([1, 2], FULL_DISK.format(rank=1)),
    ("read-only folder", 0, "on_train_batch_start", 5): (
        [2, 1],
        READ_ONLY.format(file=r"0000[23](?:_rank0)?\.(?:pt|json)"),
    ),
    ("read-only folder", 1, "on_train_batch_start", 5): ([1, 2], READ_ONLY.format(file=r"0000[23]_rank1\.pt")),
    ("read-only folder", 1, "setup", 0): ([1, 2], READ_ONLY.format(file=r"\.probe_rank1")),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", UNWRITABLE, ids=lambda case: "-".join(map(str, case)))
def test_a_rank_that_cannot_write_ends_all_and_keeps_older_checkpoints(
    case: tuple[str, int, str, int], unbroken: Path, tiny_base: Path, tmp_path: Path
) -> None:
    deed, rank, hook, count = case
    if deed == "read-only folder" and os.geteuid() != 0:
        pytest.skip("only the superuser may mount a folder read-only")
    statuses, message = UNWRITABLE[case]
    arguments = f"{{deed: {deed}, rank: {rank}, hook: {hook}, count: {count}}}"
    fault = f"{{class_path: faults.Fault, init_args: {arguments}}}"
    assert run(tmp_path, tiny_base, fault, every_n_steps=1) == statuses, output(tmp_path)
    text = output(tmp_path)
    assert len(re.findall(rf"lmchat: cannot write \S*(?:{message})", text)) == 1, text
    errors = re.findall(r"lmchat: (?!warning)", text)
    assert len(errors) == 2 and f"rank {1 - rank} lost the connection to another rank" in text
    assert "Traceback" not in text
    steps = committed_steps(tmp_path / "base_checkpoints" / "d2")
    assert steps in ([], [1], [1, 2]) and (bool(steps) == (hook != "setup")), text
    for step in steps:
        assert_saved(tmp_path, step, unbroken, newest=step == steps[-1])
    assert run(tmp_path, tiny_base, options=("--ckpt_path", "last") if steps else ()) == [0, 0], output(tmp_path)
    assert_saved(tmp_path, STEPS, unbroken)


LOSS = "the loss is not finite at step 3, in micro-batch 1 (from 0) of rank 1"
GRADIENT = "the gradient is not finite at step 3, of transformer.h.1.mlp.c_fc.weight, though every loss is"
NON_FINITE = {
    # fault, and message
    "{class_path: faults.NaNLoss, init_args: {rank: 1, micro_batch: 5}}": LOSS,
    "{class_path: faults.InfiniteGradient, init_args: "
    "{rank: 1, micro_batch: 4, parameter: transformer.h.1.mlp.c_fc.weight}}": GRADIENT,
}
non_finite = pytest.mark.parametrize("fault", NON_FINITE, ids=("loss", "gradient"))


@pytest.mark.slow
@non_finite
def test_non_finite_values_stop_the_run(fault: str, unbroken: Path, tiny_base: Path, tmp_path: Path) -> None:
    assert run(tmp_path, tiny_base, fault) == [2, 2]
    assert NON_FINITE[fault] in output(tmp_path)
    assert_saved(tmp_path, 2, unbroken)
    assert run(tmp_path, tiny_base, options=("--ckpt_path", "last")) == [0, 0]
    assert_saved(tmp_path, STEPS, unbroken)


@pytest.mark.slow
@non_finite
def test_non_finite_steps_can_be_skipped(fault: str, tiny_base: Path, tmp_path: Path) -> None:
    options = ("--non_finite_guard.action", "skip")
    assert run(tmp_path, tiny_base, fault, options, every_n_steps=1) == [0, 0], output(tmp_path)
    assert NON_FINITE[fault] in output(tmp_path)
    folder = tmp_path / "base_checkpoints" / "d2"
    weights = [load_model_state(find_checkpoint(CheckpointPaths(folder, step).meta)) for step in (2, 3, 4)]
    assert same(weights[0], weights[1]) and not same(weights[1], weights[2])
    assert all(tensor.isfinite().all() for tensor in weights[2].values())
    (path,) = (tmp_path / "logs").rglob("metrics.csv")
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["step"], row["train/skipped_steps"]) for row in rows if row["train/skipped_steps"]] == [("3", "1")]
    assert all(row["train/loss_ema"] not in ("", "nan") for row in rows if row["train/loss"])

    unbroken = tmp_path / "unbroken"
    folder.rename(unbroken)
    folder.mkdir()
    for path in unbroken.glob("*_000003*"):
        (folder / path.name).symlink_to(path)
    assert run(tmp_path, tiny_base, fault, (*options, "--ckpt_path", "last")) == [0, 0], output(tmp_path)
    assert_saved(tmp_path, STEPS, unbroken)


@pytest.mark.slow
def test_a_divergence_in_the_last_step_ends_all_ranks(tiny_base: Path, tmp_path: Path) -> None:
    assert run(tmp_path, tiny_base, "", ("--model.matrix_lr=1e30", "--trainer.max_steps=1")) == [2, 2]
    assert output(tmp_path).count("lmchat: the loss is not finite after the last step, 1; the step is not saved") == 2
    assert committed_steps(tmp_path / "base_checkpoints" / "d2") == []
