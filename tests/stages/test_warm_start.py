"""What fine-tuning loads from a pretraining checkpoint that two ranks wrote."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch  # noqa: F401  (its log handler keeps the stderr of its import: not that of one test)
import pytest
import torch
from torch import Tensor

from killable_fit import start_fit
from lmchat.__main__ import main
from lmchat.checkpoint.load import Checkpoint, find_checkpoint, load_model_state, load_rank_state

PRETRAIN_STEPS = 3
PRETRAIN = f"""
trainer: {{accelerator: cpu, devices: 2, strategy: zero2_muon, max_steps: {PRETRAIN_STEPS}}}
model:
  class_path: PretrainModule
  init_args: {{depth: 1, sequence_len: 128, head_dim: 32, global_batch_tokens: 1024, tag: tiny, matrix_lr: 0.03}}
data: {{class_path: FineWebDataModule, init_args: {{micro_batch_size: 2, eval_tokens: 512}}}}
samples: {{max_new_tokens: 0}}
eval: {{every_n_steps: 0}}
"""
SFT = """
trainer: {accelerator: cpu, devices: 1, max_steps: 1}
model: {class_path: SFTModule, init_args: {init_lr_fraction: 0.25, embedding_lr: 0.1}}
data:
  class_path: SFTDataModule
  init_args:
    eval_tokens: 256
    train: [{task: {class_path: Identity, init_args: {split: train, size: 24}}}]
    val: [{task: {class_path: Identity, init_args: {split: test, size: 4}}}]
eval: {every_n_steps: 0}
samples: {max_new_tokens: 0}
"""


@pytest.fixture(scope="module")
def base(new_base: Callable[[], Path]) -> Path:
    """A base folder with a pretraining checkpoint."""
    base = new_base()
    (base / "pretrain.yaml").write_text(PRETRAIN)
    (base / "sft.yaml").write_text(SFT)
    ranks = start_fit(["--config", str(base / "pretrain.yaml")], base, 2)
    for rank in ranks:
        rank.join(250)
    assert [rank.exitcode for rank in ranks] == [0, 0], (base / "output_rank0.txt").read_text()
    return base


@pytest.fixture(scope="module")
def warm_and_cold(base: Path) -> tuple[Checkpoint, Checkpoint]:
    """Runs fine-tuned for one step, with and without the moments of pretraining."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("LMCHAT_BASE_DIR", str(base))
        return fine_tune(base, "warm", "--model.warm_start_optimizer", "true"), fine_tune(base, "cold")


def fine_tune(base: Path, tag: str, *options: str) -> Checkpoint:
    start = str(base / "base_checkpoints" / "tiny")
    arguments = ["--config", str(base / "sft.yaml"), "--ckpt_path", start, "--model.tag", tag, *options]
    assert main(["fit", *arguments]) == 0
    return find_checkpoint(base / "chatsft_checkpoints" / tag)


def optimizer_state(checkpoint: Checkpoint) -> dict[str, Any]:
    (state,) = load_rank_state(checkpoint, 0)["optimizer_states"]
    return state


def whole(checkpoint: Checkpoint, name: str, key: str, like: Tensor) -> Tensor:
    """State ``key`` of a parameter, concatenated from the files of all ranks."""
    found = torch.full_like(like, torch.nan)
    for rank in range(checkpoint.meta["world_size"]):
        (state,) = load_rank_state(checkpoint, rank)["optimizer_states"]
        if piece := state["state"].get(name):
            found[piece["row_start"] : piece["row_start"] + len(piece[key])] = piece[key]
    return found


def test_unset_options_are_taken_from_the_checkpoint(base: Path, warm_and_cold: tuple[Checkpoint, Checkpoint]) -> None:
    before = find_checkpoint(base / "base_checkpoints" / "tiny").meta
    after = warm_and_cold[1].meta
    for name in ("model", "global_batch_tokens", "micro_batch_size"):
        assert after[name] == before[name]
    assert (after["global_batch_tokens"], after["micro_batch_size"]) == (1024, 2)
    assert after["learning_rates"] == {**before["learning_rates"], "embedding_lr": 0.1}
    assert after["learning_rates"]["matrix_lr"] == 0.03


def test_moments_are_carried_over_from_all_ranks(base: Path, warm_and_cold: tuple[Checkpoint, Checkpoint]) -> None:
    start = find_checkpoint(base / "base_checkpoints" / "tiny")
    assert start.meta["world_size"] == 2
    warm, cold = (optimizer_state(checkpoint)["state"] for checkpoint in warm_and_cold)
    assert warm.keys() == cold.keys()
    for name, state in warm.items():
        # Weights and batch are equal, so the gradient is too: the moments differ only by β · (loaded moment).
        key, beta = ("momentum_buffer", 0.85) if "momentum_buffer" in state else ("exp_avg", 0.8)
        beta = 0.96 if name == "x0_lambdas" else beta
        before = whole(start, name, key, state[key])
        scale = before.abs().max().item()
        torch.testing.assert_close(state[key] - cold[name][key], beta * before, rtol=0, atol=1e-5 * max(scale, 1e-3))
        if key == "exp_avg":
            assert (state["step"], cold[name]["step"]) == (PRETRAIN_STEPS + 1, 1)
    assert whole(start, "lm_head.weight", "exp_avg", warm["lm_head.weight"]["exp_avg"]).abs().max() > 0


def test_learning_rates_come_from_the_new_stage(warm_and_cold: tuple[Checkpoint, Checkpoint]) -> None:
    warm, cold = (optimizer_state(checkpoint)["param_groups"] for checkpoint in warm_and_cold)
    assert warm == cold
    groups = {group["name"]: group for group in warm}
    width = warm_and_cold[0].meta["model"]["n_embd"]
    assert groups["wte"]["initial_lr"] == 0.1 * (width / 768) ** -0.5 * 0.25
    assert all(group["initial_lr"] == 0.03 * 0.25 for group in warm if group["kind"] == "muon")
    assert all(group["lr"] == group["initial_lr"] for group in warm), "no warm-up, and the first step of the epoch"
    assert all(group["weight_decay"] == 0 for group in warm)


def test_a_missing_optimizer_file_is_reported(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LMCHAT_BASE_DIR", str(base))
    copy = tmp_path / "tiny"
    copy.mkdir()
    for file in (base / "base_checkpoints" / "tiny").iterdir():
        if file.is_file() and "rank1" not in file.name:
            (copy / file.name).symlink_to(file)
    options = ["--config", str(base / "sft.yaml"), "--ckpt_path", str(copy), "--model.warm_start_optimizer", "true"]
    assert main(["fit", *options]) == 2
    assert f"optim_{PRETRAIN_STEPS:06d}_rank1.pt is missing" in capfd.readouterr().err


def test_without_a_micro_batch_in_the_checkpoint_one_must_be_given(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from lmchat.checkpoint.writer import json_digest

    monkeypatch.setenv("LMCHAT_BASE_DIR", str(base))
    copy = tmp_path / "tiny"
    copy.mkdir()
    for file in (base / "base_checkpoints" / "tiny").iterdir():
        if file.suffix == ".pt":
            (copy / file.name).symlink_to(file)
    meta = dict(find_checkpoint(base / "base_checkpoints" / "tiny").meta)
    del meta["micro_batch_size"]
    (copy / f"meta_{PRETRAIN_STEPS:06d}.json").write_text(json.dumps({**meta, "meta_sha256": json_digest(meta)}))
    options = ["--config", str(base / "sft.yaml"), "--ckpt_path", str(copy)]
    assert main(["fit", *options, "--model.tag", "unknown"]) == 2
    assert "--data.micro_batch_size" in capfd.readouterr().err
    still = ("--model.init_lr_fraction", "0", "--model.warm_start_optimizer", "true")
    assert main(["fit", *options, "--model.tag", "given", "--data.micro_batch_size", "4", *still]) == 0
    given = find_checkpoint(base / "chatsft_checkpoints" / "given")
    assert given.meta["micro_batch_size"] == 4
    # Without a learning rate the weights are those of the checkpoint.
    expected, actual = load_model_state(find_checkpoint(base / "base_checkpoints" / "tiny")), load_model_state(given)
    assert all(torch.equal(expected[name], actual[name]) for name in expected)
