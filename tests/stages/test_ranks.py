"""Fine-tuning and reinforcement learning on 2 or 3 processes train what one process trains, in double precision."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from killable_fit import start_fit
from lmchat.__main__ import main
from lmchat.checkpoint.load import find_checkpoint, load_model_state

PRETRAIN = """
trainer: {accelerator: cpu, devices: 1, max_steps: 1}
model:
  class_path: PretrainModule
  init_args:
    {depth: 1, sequence_len: 256, aspect_ratio: 32, head_dim: 32, window_pattern: L, global_batch_tokens: 3072,
     tag: tiny}
data: {class_path: FineWebDataModule, init_args: {micro_batch_size: 2, eval_tokens: 1024}}
eval: {every_n_steps: 0, at_start: false, at_end: false}
samples: {max_new_tokens: 0}
"""
COMMON = """
trainer: {{accelerator: cpu, max_steps: 3, callbacks: [{{class_path: faults.Diary, init_args: {{directory: {base}}}}}]}}
eval: {{every_n_steps: 0, at_end: false}}
monitor: {{every_n_steps: 1}}
samples: {{max_new_tokens: 0}}
"""
STAGES = {
    "sft": """
model: {class_path: float64.Float64SFT}
data:
  class_path: SFTDataModule
  init_args:
    micro_batch_size: 2
    eval_tokens: 1024
    train: [{task: {class_path: Identity, init_args: {split: train, size: 60}}}]
    val: [{task: {class_path: Identity, init_args: {split: test, size: 8}}}]
""",
    "grpo": """
model: {class_path: float64.Float64GRPO}
data:
  class_path: RolloutDataModule
  init_args:
    train: [{task: {class_path: float64.Whims, init_args: {split: train, size: 18}}}]
    eval_task: {class_path: lmchat.demo.tasks.Arithmetic, init_args: {split: test, size: 3}}
    questions_per_step: 6
    num_samples: 3
    eval_num_samples: 2
    max_new_tokens: 6
""",
}


@pytest.fixture(scope="module")
def pretrained(new_base: Callable[[], Path]) -> Path:
    base = new_base()
    (base / "pretrain.yaml").write_text(PRETRAIN)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("LMCHAT_BASE_DIR", str(base))
        assert main(["fit", "--config", str(base / "pretrain.yaml")]) == 0
    return base


def diary(base: Path, world_size: int) -> dict[tuple[int, int], tuple[str, float]]:
    """Contents and loss of each micro-batch, by step and position in the step over all ranks."""
    entries = {}
    for rank in range(world_size):
        for line in (base / f"diary_{world_size}_{rank}.txt").read_text().splitlines():
            step, place, content, loss = line.split()
            entries[int(step), int(place)] = content, float.fromhex(loss)
    return entries


def train(stage: str, world_size: int, pretrained: Path, folder: Path) -> dict[str, torch.Tensor]:
    """Trains on a number of processes; the losses are recorded in a folder in ``folder``, whose name tags the run."""
    own, tag = folder / str(world_size), f"{folder.name}_{world_size}"
    own.mkdir(parents=True)
    config = own / "config.yaml"
    config.write_text(STAGES[stage] + COMMON.format(base=own))
    ranks = start_fit(
        [
            *("--config", str(config), "--ckpt_path", str(pretrained / "base_checkpoints" / "tiny")),
            *("--model.tag", tag, "--trainer.devices", str(world_size)),
            *(("--trainer.strategy", "zero2_muon") if world_size > 1 else ()),
        ],
        pretrained,
        world_size,
    )
    for rank in ranks:
        rank.join(250)
    hanging = [rank for rank in ranks if rank.is_alive()]
    for rank in hanging:
        rank.kill()
    text = "\n".join(path.read_text()[-3000:] for path in pretrained.glob("output_rank*.txt"))
    assert [rank.exitcode for rank in ranks] == [0] * world_size, text
    checkpoints = {"sft": "chatsft_checkpoints", "grpo": "chatrl_checkpoints"}[stage]
    return load_model_state(find_checkpoint(pretrained / checkpoints / tag))


def figures(pretrained: Path, folder: Path, world_size: int) -> list[dict[str, float]]:
    """Logged metrics of the samples of each step."""
    (path,) = (pretrained / "logs" / "grpo" / f"{folder.name}_{world_size}").rglob("metrics.csv")
    names = ["reward", "pass@1", "length", "truncated", "entropy", "no_signal", "sampled_tokens", "tokens"]
    with path.open() as file:
        rows = [row for row in csv.DictReader(file) if row["train/loss"]]
    return [{name: float(row[f"train/{name}"]) for name in names} for row in rows]


def by_step(entries: dict[tuple[int, int], tuple[str, float]]) -> dict[int, tuple[list[str], float]]:
    """Rows and sum of losses of each step."""
    steps: dict[int, tuple[list[str], float]] = {}
    for (step, _), (content, loss) in entries.items():
        rows, total = steps.get(step, ([], 0.0))
        own = [] if content == "empty" else content.split(",")
        steps[step] = sorted([*rows, *own]), total + loss
    return steps


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("stage", STAGES)
def test_several_ranks_train_the_same_as_one(stage: str, ranks: int, pretrained: Path) -> None:
    folder = pretrained / f"{stage}_of_{ranks}"
    alone, shared = (train(stage, world_size, pretrained, folder) for world_size in (1, ranks))
    expected, found = (diary(folder / str(world_size), world_size) for world_size in (1, ranks))
    losses = [loss for _, loss in expected.values()]
    assert len(losses) == 3 * 6 and any(losses)
    assert found.keys() == expected.keys()
    if stage == "grpo":
        assert not all(losses), "no empty micro-batch"
        # Each rank divides its own rows into micro-batches. Losses are scaled by the micro-batches per step.
        for step, (rows, total) in by_step(expected).items():
            assert by_step(found)[step] == (rows, pytest.approx(total, abs=1e-9))
        for several, one in zip(figures(pretrained, folder, ranks), figures(pretrained, folder, 1), strict=True):
            assert several == pytest.approx(one)
    else:
        for place, (content, loss) in expected.items():
            assert found[place] == (content, pytest.approx(loss, abs=1e-10))
    for name, tensor in alone.items():
        assert tensor.dtype == torch.float64
        torch.testing.assert_close(shared[name], tensor, rtol=0, atol=1e-10, msg=name)
