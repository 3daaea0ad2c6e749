"""Options that are changed when a run is resumed take effect and are recorded in the checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
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


@pytest.fixture(scope="module")
def base(new_base: Callable[[], Path]) -> Path:
    """A base folder with a run of unchanged options."""
    base = new_base()
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("LMCHAT_BASE_DIR", str(base))
        assert main(["fit", *config_options(base, OWN), "--model.tag", "run"]) == 0
    return base


@pytest.mark.parametrize("option", CHANGES)
def test_a_learning_rate_changed_on_resume_is_used(option: str, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMCHAT_BASE_DIR", str(base))
    options = config_options(base, OWN)
    unchanged = weights(base, "run", 4)
    changed_options, still = CHANGES[option]
    start = ["--ckpt_path", str(base / "base_checkpoints" / "run" / "meta_000002.json")]
    assert main(["fit", *options, "--model.tag", option, *start, *changed_options]) == 0
    before, after = weights(base, "run", 2), weights(base, option, 4)
    for name, weight in after.items():
        never_moves = torch.equal(unchanged[name], before[name])
        assert torch.equal(weight, before[name]) == (name.startswith(still) or never_moves), name
    meta = json.loads((base / "base_checkpoints" / option / "meta_000004.json").read_text())
    assert {**meta["learning_rates"], "lr_scale": meta["lr_scale"]}[option] == 0
