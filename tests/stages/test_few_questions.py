"""Evaluation on fewer questions or rows than ranks does not hang."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from killable_fit import start_fit
from lmchat.demo.tasks import Arithmetic
from lmchat.evaluation.chat_tasks import question_batches
from lmchat.tasks import Identity

RANKS = 3
PRETRAIN = """
trainer: {accelerator: cpu, max_steps: 1}
model:
  class_path: PretrainModule
  init_args: {depth: 1, sequence_len: 256, head_dim: 32, window_pattern: L, global_batch_tokens: 1536, tag: tiny}
data: {class_path: FineWebDataModule, init_args: {micro_batch_size: 2, eval_tokens: 1536}}
eval: {every_n_steps: 0, at_start: false}
samples: {max_new_tokens: 0}
"""
CHAT = """
trainer: {accelerator: cpu, max_steps: 1}
eval: {every_n_steps: 0}
samples: {max_new_tokens: 0}
"""
STAGES = {
    "sft": """
model: {class_path: SFTModule}
data:
  class_path: SFTDataModule
  init_args:
    micro_batch_size: 1
    eval_tokens: 256
    eval_max_new_tokens: 4
    eval_batch_size: 1
    train: [{task: {class_path: Identity, init_args: {split: train, size: 60}}}]
    val: [{task: {class_path: Identity, init_args: {split: test, size: 1}}}]
    eval_tasks: [{class_path: lmchat.demo.tasks.Arithmetic, init_args: {split: test, size: 5}}]
""",
    "grpo": """
model: {class_path: GRPOModule}
data:
  class_path: RolloutDataModule
  init_args:
    train: [{task: {class_path: lmchat.demo.tasks.Arithmetic, init_args: {split: train, size: 18}}}]
    eval_task: {class_path: lmchat.demo.tasks.Arithmetic, init_args: {split: test, size: 1}}
    eval_tasks: [{class_path: Identity, init_args: {split: test, size: 2}}]
    questions_per_step: 3
    num_samples: 2
    eval_num_samples: 2
    max_new_tokens: 4
""",
}


def evaluations(logs: Path) -> list[dict[str, float]]:
    """Evaluation metrics in order."""
    (path,) = logs.rglob("metrics.csv")
    with path.open() as file:
        rows = list(csv.DictReader(file))
    measured = [{name: float(value) for name, value in row.items() if "val/" in name and value} for row in rows]
    return [row for row in measured if row]


def fit(base: Path, config: str, ranks: int, *options: str) -> None:
    (base / "own.yaml").write_text(config)
    processes = start_fit(["--config", str(base / "own.yaml"), "--trainer.devices", str(ranks), *options], base, ranks)
    for process in processes:
        process.join(250)
    hanging = [process for process in processes if process.is_alive()]
    for process in hanging:
        process.kill()
    text = "\n".join(path.read_text()[-3000:] for path in base.glob("output_rank*.txt"))
    assert [process.exitcode for process in processes] == [0] * ranks, text


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_metrics_of_several_ranks_equal_one_process(base: Path) -> None:
    for ranks in (1, RANKS):
        fit(base, PRETRAIN, ranks, "--model.tag", f"base{ranks}")
    measured = {ranks: evaluations(base / "logs" / "pretrain" / f"base{ranks}") for ranks in (1, RANKS)}
    assert measured[1] and measured[RANKS] == [pytest.approx(row, rel=1e-5) for row in measured[1]]
    for stage, config in STAGES.items():
        for ranks in (1, RANKS):
            folder = base / "base_checkpoints" / "base1"
            fit(base, config + CHAT, ranks, "--ckpt_path", str(folder), "--model.tag", f"chat{ranks}")
        measured = {ranks: evaluations(base / "logs" / stage / f"chat{ranks}") for ranks in (1, RANKS)}
        assert len(measured[1]) == 2
        assert measured[RANKS] == [pytest.approx(row, rel=1e-5) for row in measured[1]]


def test_every_rank_has_a_batch_of_every_task() -> None:
    tasks = [Arithmetic("test", size=2), Identity("test", size=7)]
    for task, expected in zip(tasks, [[[1], [1], [0]], [[2, 1], [2], [2]]], strict=True):
        shares = [list(question_batches(task, batch_size=2, rank=rank, world_size=RANKS)) for rank in range(RANKS)]
        assert [[len(batch) for batch in share] for share in shares] == expected
        asked = [str(conversation) for share in shares for batch in share for conversation in batch]
        assert sorted(asked) == sorted(str(conversation) for conversation in task)
