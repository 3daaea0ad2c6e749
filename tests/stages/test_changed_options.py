"""Options that are changed when a run is resumed take effect and are recorded in the checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import lightning.pytorch  # noqa: F401  (its log handler keeps the stderr of its import: not that of one test)
import pytest
import torch

from lmchat.__main__ import main
from lmchat.checkpoint.layout import CheckpointPaths
from lmchat.checkpoint.load import load_model_state, open_checkpoint
from tiny_fit import config_options

OWN = """
trainer: {max_steps: 4}
model: {init_args: {compute_dtype: fp32}}
checkpoint: {every_n_steps: 2}
eval: {every_n_steps: 0, at_start: false, at_end: false}
"""
CHANGES = {
    "matrix_lr": (["--model.matrix_lr", "0"], "transformer.h."),
    "embedding_lr": (["--model.embedding_lr", "0"], ("transformer.wte", "value_embeds")),
    "unembedding_lr": (["--model.unembedding_lr", "0"], "lm_head"),
    "scalar_lr": (["--model.scalar_lr", "0"], ("resid_lambdas", "x0_lambdas")),
    "lr_scale": (["--scaling_laws.lr_scale", "0"], ""),
}
"""By option: its new value, and the beginnings of the names of the weights that it holds still."""


def weights(base: Path, tag: str, step: int) -> dict[str, torch.Tensor]:
    return load_model_state(open_checkpoint(CheckpointPaths(base / "base_checkpoints" / tag, step)))


@pytest.mark.parametrize("option", CHANGES)
def test_a_learning_rate_changed_on_resume_is_used(option: str, base: Path) -> None:
    options = config_options(base, OWN)
    assert main(["fit", *options, "--model.tag", "run"]) == 0
    unchanged = weights(base, "run", 4)
    changed_options, still = CHANGES[option]
    start = ["--ckpt_path", str(base / "base_checkpoints" / "run" / "meta_000002.json")]
    assert main(["fit", *options, "--model.tag", "changed", *start, *changed_options]) == 0
    before, after = weights(base, "run", 2), weights(base, "changed", 4)
    for name, weight in after.items():
        never_moves = torch.equal(unchanged[name], before[name])
        assert torch.equal(weight, before[name]) == (name.startswith(still) or never_moves), name
    meta = json.loads((base / "base_checkpoints" / "changed" / "meta_000004.json").read_text())
    assert {**meta["learning_rates"], "lr_scale": meta["lr_scale"]}[option] == 0
