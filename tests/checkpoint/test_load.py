from __future__ import annotations

from pathlib import Path

import pytest
import torch

from checkpoint_meta import MODEL
from lmchat.checkpoint import load as loading
from lmchat.checkpoint.layout import CheckpointPaths
from lmchat.checkpoint.load import (
    DamagedCheckpoint,
    find_checkpoint,
    load_inference_model,
    load_model,
    load_model_state,
    load_rank_state,
    open_checkpoint,
)
from lmchat.tokenizer.bpe import Tokenizer
from lmchat.types import UserError
from random_checkpoint import save_random_checkpoint

FILES = ["model_000002.pt", "optim_000002_rank0.pt", "meta_000002.json"]


@pytest.fixture
def folder(tmp_path: Path, save) -> Path:
    save(tmp_path, 1)
    save(tmp_path, 2)
    return tmp_path


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def alter(path: Path) -> None:
    content = bytearray(path.read_bytes())
    # In meta.json this is within a value: the result is still JSON.
    position = content.index(b'"n_layer": 4') + 11 if path.suffix == ".json" else len(content) // 2
    content[position] ^= 1
    path.write_bytes(content)


DAMAGE = {"truncated": truncate, "altered": alter, "missing": Path.unlink}
CASES = [(file, how) for file in FILES for how in DAMAGE if (file, how) != ("meta_000002.json", "missing")]


def test_every_way_to_name_a_checkpoint(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    older = CheckpointPaths(folder, 1)
    assert find_checkpoint(older.model).step == find_checkpoint(str(older.meta)).step == 1
    assert find_checkpoint(folder).step == find_checkpoint("last", directory=folder).step == 2
    monkeypatch.setenv("HOME", str(folder.parent))
    assert find_checkpoint(f"~/{folder.name}").step == 2


def test_only_the_requested_files_are_read(folder: Path) -> None:
    checkpoint = find_checkpoint(folder)
    assert (checkpoint.stage, checkpoint.meta["world_size"], checkpoint.meta["model"]) == ("pretrain", 1, MODEL)
    assert load_model_state(checkpoint).keys() == {"transformer.wte.weight"}
    assert load_rank_state(checkpoint, 0)["position"] == [2, None]


@pytest.mark.parametrize(("file", "how"), CASES)
def test_a_damaged_file_is_reported(file: str, how: str, folder: Path) -> None:
    DAMAGE[how](folder / file)
    with pytest.raises(DamagedCheckpoint, match=rf"{file} is .*{how}.*use an older checkpoint"):
        find_checkpoint(CheckpointPaths(folder, 2).model)


@pytest.mark.parametrize(("file", "how"), CASES)
def test_last_falls_back_to_an_older_checkpoint_with_a_warning(file: str, how: str, folder: Path) -> None:
    DAMAGE[how](folder / file)
    said: list[str] = []
    assert find_checkpoint("last", directory=folder, warn=said.append).step == 1
    assert len(said) == 2
    assert file in said[0] and how in said[0]
    assert "falling back" in said[1] and "meta_000001.json" in said[1]


def test_a_checkpoint_without_meta_is_ignored(folder: Path) -> None:
    paths = CheckpointPaths(folder, 2)
    paths.meta.unlink()
    said: list[str] = []
    assert find_checkpoint(folder, warn=said.append).step == 1
    assert f"step 2: it is unfinished ({paths.meta} is missing)" in said[0]
    assert "falling back" in said[1] and "meta_000001.json" in said[1]
    with pytest.raises(
        UserError, match=r"never finished \(meta_000002.json is missing\); complete there: steps 1; give"
    ):
        find_checkpoint(paths.model)


@pytest.mark.parametrize("content", ["", "[]", "{}", "7", '{"format": 1}', "\xff\xfe"])
def test_invalid_meta_counts_as_damage(content: str, folder: Path) -> None:
    meta = CheckpointPaths(folder, 2).meta
    meta.write_bytes(content.encode("latin-1"))
    with pytest.raises(DamagedCheckpoint, match=r"meta_000002.json is truncated or altered"):
        find_checkpoint(meta)


def test_only_the_files_asked_for_are_verified(folder: Path) -> None:
    paths = CheckpointPaths(folder, 2)
    truncate(paths.optimizer(0))
    assert open_checkpoint(paths, files=[paths.model]).step == 2
    with pytest.raises(DamagedCheckpoint, match=r"optim_000002_rank0.pt is truncated"):
        open_checkpoint(paths)
    with pytest.raises(DamagedCheckpoint, match=r"lists no optim_000002_rank1.pt"):
        open_checkpoint(paths, files=[paths.optimizer(1)])


def test_no_checkpoint_is_reported(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "d4"):
        with pytest.raises(UserError, match=rf"no checkpoint in {path}; train one first"):
            find_checkpoint(path)
        with pytest.raises(UserError, match=rf"no checkpoint in {path}"):
            find_checkpoint("last", directory=path)
    with pytest.raises(UserError, match=r"no checkpoint of step 7 in .*there is none"):
        find_checkpoint(tmp_path / "model_000007.pt")
    with pytest.raises(UserError, match=r"epoch=3.ckpt is not an lmchat checkpoint"):
        find_checkpoint(tmp_path / "epoch=3.ckpt")
    with pytest.raises(UserError, match="`last` needs a run"):
        find_checkpoint("last")


def test_only_damaged_checkpoints_are_reported(folder: Path) -> None:
    for step in (1, 2):
        truncate(CheckpointPaths(folder, step).model)
    with pytest.raises(DamagedCheckpoint, match=r"has no complete checkpoint: .*model_000002.pt is truncated"):
        find_checkpoint(folder, warn=lambda message: None)


def test_a_newer_format_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmchat.checkpoint.load.FORMAT", 0)
    with pytest.raises(UserError, match="has format 1, this lmchat reads 0"):
        find_checkpoint(folder)


def test_loading_runs_no_code_from_the_file(folder: Path, tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple:
            return Path.touch, (tmp_path / "owned",)

    checkpoint = find_checkpoint(folder)
    for path, load in (
        (checkpoint.paths.optimizer(0), lambda: load_rank_state(checkpoint, 0)),
        (checkpoint.paths.model, lambda: load_model_state(checkpoint)),
    ):
        torch.save({"state": Hostile()}, path)
        with pytest.raises(
            DamagedCheckpoint,
            match=rf"{path.name} contains more than tensors.*damaged \('Unsupported .*nothing in it was executed",
        ):
            load()
    assert not (tmp_path / "owned").exists()


def test_an_inference_model_has_weights_of_its_compute_dtype_and_the_same_results(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loading, "default_compute_dtype", lambda device: torch.bfloat16)
    tokenizer = Tokenizer({bytes([byte]): byte for byte in range(256)})
    checkpoint, ids = open_checkpoint(save_random_checkpoint(tokenizer)), torch.arange(12).view(1, 12)
    exact, cast = load_model(checkpoint), load_inference_model(checkpoint)
    assert {weight.dtype for weight in exact.parameters()} == {torch.float32}
    assert cast.lm_head.weight.dtype == cast.transformer.wte.weight.dtype == torch.bfloat16
    assert cast.resid_lambdas.dtype == torch.float32
    assert cast(ids).equal(exact(ids))
