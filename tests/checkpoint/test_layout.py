from __future__ import annotations

from pathlib import Path

import pytest

from lmchat.checkpoint.layout import CheckpointPaths, checkpoint_dir, committed_steps, files_by_step
from lmchat.types import UserError


def test_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMCHAT_BASE_DIR", str(tmp_path))
    paths = CheckpointPaths(checkpoint_dir("pretrain", "d26"), 5000)
    assert paths.model == tmp_path / "base_checkpoints/d26/model_005000.pt"
    assert paths.optimizer(3) == tmp_path / "base_checkpoints/d26/optim_005000_rank3.pt"
    assert paths.meta == tmp_path / "base_checkpoints/d26/meta_005000.json"
    assert checkpoint_dir("sft", "d26") == tmp_path / "chatsft_checkpoints/d26"
    assert checkpoint_dir("grpo", "d26") == tmp_path / "chatrl_checkpoints/d26"


@pytest.mark.parametrize("step", [0, 7, 5000, 1_234_567])
def test_file_names_round_trip_to_steps(step: int) -> None:
    paths = CheckpointPaths(Path("somewhere"), step)
    assert CheckpointPaths.of(paths.model) == CheckpointPaths.of(str(paths.meta)) == paths


@pytest.mark.parametrize("name", ["epoch=1.ckpt", "model_12.pt", "model_000012.pt.tmp", "optim_000012_rank0.pt"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=name):
        CheckpointPaths.of(name)


def test_steps_with_meta_are_committed_in_numeric_order(tmp_path: Path) -> None:
    for name in [
        "meta_000010.json",
        "meta_1000000.json",
        "meta_000002.json",
        "model_000003.pt",
        "meta_000004.json.tmp",
    ]:
        (tmp_path / name).touch()
    (tmp_path / "notes.txt").touch()
    assert committed_steps(tmp_path) == [2, 10, 1_000_000]
    assert sorted(files_by_step(tmp_path)) == [2, 3, 4, 10, 1_000_000]
    assert committed_steps(tmp_path / "missing") == []
