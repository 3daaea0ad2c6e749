"""A malicious or damaged meta or weights file gives one message that names the file, before anything is built."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from checkpoint_meta import META
from lmchat.checkpoint.layout import CheckpointPaths, checkpoint_dir
from lmchat.checkpoint.load import (
    Checkpoint,
    DamagedCheckpoint,
    check_can_resume,
    find_checkpoint,
    load_model_state,
    load_rank_state,
    open_checkpoint,
)
from lmchat.checkpoint.meta_schema import COUNTER, check_meta, check_settings, check_state
from lmchat.checkpoint.tensors import check_tensors
from lmchat.checkpoint.writer import json_digest
from lmchat.types import UserError

Change = Callable[[dict[str, Any]], Any]


def put(*path: str, value: Any) -> Change:
    def change(meta: dict[str, Any]) -> None:
        for name in path[:-1]:
            meta = meta[name]
        meta[path[-1]] = value

    return change


def remove(name: str) -> Change:
    return lambda meta: meta.pop(name)


def rewrite(paths: CheckpointPaths, change: Change) -> None:
    """Changes a meta and updates its checksum."""
    meta = json.loads(paths.meta.read_text())
    del meta["meta_sha256"]
    change(meta)
    paths.meta.write_text(json.dumps({**meta, "meta_sha256": json_digest(meta)}))


HUGE = 10**9
WRONG: list[tuple[Change, str]] = [
    (put("tag", value="../../../escaped"), r"tag is '../../../escaped'; it must be the name of a folder"),
    (put("tag", value="/etc"), "tag is '/etc'"),
    (put("tag", value=".."), "tag is '..'"),
    (put("tag", value=""), "tag is ''"),
    (put("tag", value="x" * 300), "tag is 'xxx"),
    (put("tag", value=["d4"]), r"tag is \['d4'\]"),
    (put("tag", value="\x1b[2Jd4"), r"'tag' contains control characters: '\\x1b\[2Jd4'"),
    (put("tag", value="a\u202eb"), "'tag' contains control characters"),
    (put("unknown", value={"\x1b]0;": 1}), "'a name' contains control characters"),
    (put("stage", value="mystery"), "stage is 'mystery'; it must be one of pretrain, sft, rl, grpo"),
    (put("stage", value={}), "stage is {}"),
    (put("step", value=3), "step is 3, and the file's name says 2"),
    (put("world_size", value=0), "world_size is 0; it must be a whole number"),
    (put("world_size", value=HUGE), "world_size is 1000000000"),
    (put("world_size", value=1000), "files names 2 files"),
    (put("world_size", value=True), "world_size is True"),
    (put("world_size", value=2.0), "world_size is 2.0"),
    (put("files", value=[]), r"files is \[\]"),
    (put("files", "../../model.pt", value={}), "files names 3 files"),
    (put("files", "model_000002.pt", "bytes", value="many"), "files.model_000002.pt.bytes is 'many'"),
    (put("files", "model_000002.pt", "sha256", value="0"), "files.model_000002.pt.sha256 is '0'"),
    (put("files", "model_000002.pt", value=None), "files.model_000002.pt is None"),
    (put("model", "n_layer", value=HUGE), "model.n_layer is 1000000000; it must be a whole number from 1 to 10000"),
    (put("model", "sequence_len", value=2**24), "model.sequence_len is 16777216; it must be a whole number from 1 to"),
    (put("model", "n_embd", value=2048), r"n_embd 2048.* has at least 167,.* parameters, and the weights file has"),
    (
        put("files", "optim_000002_rank0.pt", "bytes", value=2**40),
        r"optim_000002_rank0.pt has 1,099,511,627,776 bytes, and a model of this shape at most",
    ),
    (put("files", "model_000002.pt", "bytes", value=2**40), "model_000002.pt has 1,099,511,627,776 bytes"),
    (put("model", "n_head", value=0), "model.n_head is 0"),
    (put("model", "n_head", value=3), "n_embd 2 over n_head 3"),
    (put("model", "n_layer", value="4"), "model.n_layer is '4'"),
    (put("model", "n_layer", value=[[[]]]), "model.n_layer is"),
    (put("model", "window_pattern", value=7), "model.window_pattern is 7"),
    (put("model", "window_pattern", value="XY"), "window_pattern is 'XY'"),
    (put("model", "residual_mix", value=1), "model.residual_mix is 1; it must be true or false"),
    (put("model", "gelu", value=True), "model.'gelu' is unknown to this version"),
    (put("learning_rates", value=[1, 2]), r"learning_rates is \[1, 2\]"),
    (put("learning_rates", "matrix_lr", value=-1), "learning_rates.matrix_lr is -1; it must be a number, 0 or more"),
    (put("learning_rates", "matrix_lr", value=float("nan")), "'matrix_lr' is nan"),
    (put("learning_rates", "matrix_lr", value=float("inf")), "'matrix_lr' is inf"),
    (put("learning_rates", value={}), "learning_rates.embedding_lr is missing"),
    (put("global_batch_tokens", value=0), "global_batch_tokens is 0"),
    (put("global_batch_tokens", value=2**80), "global_batch_tokens is 1208925819614629174706176"),
    (put("micro_batch_size", value="x"), "micro_batch_size is 'x'"),
    (put("compute_dtype", value="fp8"), "compute_dtype is 'fp8'; it must be one of bf16, fp32"),
    (put("weights_only", value="yes"), "weights_only is 'yes'"),
    (put("tokenizer_fingerprint", value=7), "tokenizer_fingerprint is 7"),
    *((remove(name), f"{name} is missing") for name in ("files", "stage", "tag", "model", "learning_rates", "step")),
]


@pytest.fixture
def folder(tmp_path: Path, save) -> Path:
    save(tmp_path, 1)
    save(tmp_path, 2)
    return tmp_path


@pytest.mark.parametrize(("change", "message"), WRONG, ids=[message[:40] for _, message in WRONG])
def test_a_wrong_value_is_reported(change: Change, message: str, folder: Path) -> None:
    paths = CheckpointPaths(folder, 2)
    rewrite(paths, change)
    with pytest.raises(DamagedCheckpoint, match=message) as caught:
        open_checkpoint(paths)
    said = str(caught.value)
    assert said.startswith(str(paths.meta)) and said.endswith("use an older checkpoint")
    assert said.isprintable() and len(said) < 600
    assert find_checkpoint(folder, warn=lambda _: None).step == 1


def test_a_missing_or_unknown_format_is_refused(folder: Path) -> None:
    paths = CheckpointPaths(folder, 2)
    for change in (remove("format"), put("format", value="\x1b[2J")):
        rewrite(paths, change)
        with pytest.raises(UserError, match=r"has format .*this lmchat reads 1") as caught:
            open_checkpoint(paths)
        assert str(caught.value).isprintable()


@pytest.mark.parametrize("content", ["[" * 200_000, '{"a":' * 200_000, '{"meta_sha256": ' + "9" * 5000 + "}"])
def test_unparsable_json_is_refused(content: str, folder: Path) -> None:
    paths = CheckpointPaths(folder, 2)
    paths.meta.write_text(content)
    with pytest.raises(DamagedCheckpoint, match=r"meta_000002.json is .*altered"):
        open_checkpoint(paths)


def test_deeply_nested_json_is_refused(folder: Path) -> None:
    paths = CheckpointPaths(folder, 2)
    deep: Any = 1
    for _ in range(200):
        deep = [deep]
    rewrite(paths, put("extra", value=deep))
    with pytest.raises(DamagedCheckpoint, match="'extra' is nested more than 32 deep"):
        open_checkpoint(paths)


def test_a_folder_instead_of_a_file_is_refused(folder: Path) -> None:
    for name in ("model_000002.pt", "meta_000002.json"):
        (folder / name).unlink()
        (folder / name).mkdir()
        with pytest.raises(DamagedCheckpoint, match=rf"{name} is not a regular file"):
            find_checkpoint(folder / "meta_000002.json")


def npy(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.zeros(3))


def archive(path: Path, content: Any) -> None:
    torch.save(content, path)


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("raise SystemExit('executed')",)


class HostileModule:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch executed",)


FOREIGN: dict[str, Callable[[Path], Any]] = {
    "pickle": lambda path: path.write_bytes(pickle.dumps({"a": 1})),
    "hostile pickle": lambda path: path.write_bytes(pickle.dumps(Hostile())),
    "legacy": lambda path: torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=False),
    "archive of a hostile module": lambda path: archive(path, {"a": HostileModule()}),
    "hostile archive": lambda path: archive(path, {"a": Hostile()}),
    "module": lambda path: archive(path, torch.nn.Linear(2, 2)),
    "list": lambda path: archive(path, [torch.ones(2)]),
    "npy": npy,
    "empty zip": lambda path: path.write_bytes(b"PK\x03\x04" + bytes(100)),
    "text": lambda path: path.write_text("version https://git-lfs.github.com/spec/v1"),
    "nothing": lambda path: path.write_bytes(b""),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_file_without_weights_is_refused(kind: str, folder: Path) -> None:
    checkpoint = find_checkpoint(folder)
    for path, load in (
        (checkpoint.paths.model, lambda: load_model_state(checkpoint)),
        (checkpoint.paths.optimizer(0), lambda: load_rank_state(checkpoint, 0)),
    ):
        FOREIGN[kind](path)
        with pytest.raises(DamagedCheckpoint, match=rf"{path.name} (is|contains) .*use an older checkpoint") as caught:
            load()
        assert str(caught.value).isprintable()
        assert "Weights only load failed" not in str(caught.value)


def test_weights_that_are_not_tensors_are_refused(folder: Path) -> None:
    checkpoint, expected = find_checkpoint(folder), {"a": torch.ones(2)}
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    contents: dict[str, list[Any]] = {
        "contains 1, which this architecture does not have": [{1: torch.ones(2), **expected}],
        "of type torch.int64; give": [{"a": torch.ones(2, dtype=torch.int64)}],
        "not a dense tensor": [
            {"a": value} for value in (1, torch.ones(2).to_sparse(), torch.ones(2, device="meta"), nested)
        ],
    }
    for message, states in contents.items():
        for state in states:
            torch.save(state, checkpoint.paths.model)
            with pytest.raises(UserError, match=f"weights.pt .*{message}"):
                check_tensors(load_model_state(checkpoint), expected, "weights.pt", "copy it")


RANK_STATE: dict[str, Any] = {"optimizer_states": [{}], "rng": {}, "callbacks": {}, "lr_schedulers": []}


@pytest.mark.parametrize("name", RANK_STATE)
def test_a_missing_part_of_a_rank_is_reported(name: str, folder: Path) -> None:
    """Otherwise the run would continue with a new optimizer, other random numbers or other averages."""
    checkpoint = find_checkpoint(folder)
    path = checkpoint.paths.optimizer(0)
    torch.save({key: value for key, value in RANK_STATE.items() if key != name}, path)
    with pytest.raises(DamagedCheckpoint, match=rf"{path.name} lacks {name}"):
        load_rank_state(checkpoint, 0)
    torch.save(RANK_STATE | {"optimizer_states": []}, path)
    with pytest.raises(DamagedCheckpoint, match=rf"{path.name} has no optimizer state"):
        load_rank_state(checkpoint, 0)


@pytest.mark.parametrize("state", [7, {}, {"steps": "x"}, {"steps": -1}, {"steps": True}])
def test_a_damaged_state_of_a_callback_is_reported(state: Any) -> None:
    with pytest.raises(UserError, match=r"the state of Path in the checkpoint is damaged: .*; use an older checkpoint"):
        check_state(Path, state, {"steps": COUNTER})
    check_state(Path, {"steps": 3}, {"steps": COUNTER})


def test_a_tag_cannot_leave_the_base_folder() -> None:
    for tag in ("../x", "/etc", ".", "..", "", "a/b", "a\\b", "a\nb", "\0"):
        with pytest.raises(UserError, match="is not a folder name"):
            checkpoint_dir("pretrain", tag)
    assert checkpoint_dir("pretrain", META["tag"]).name == "tiny"


def test_a_meta_of_the_first_release_is_accepted(fixtures: Path) -> None:
    """Written by lmchat of November 2026, before the schema existed."""
    meta = json.loads((fixtures / "meta_format_1.json").read_text())
    assert json_digest({name: value for name, value in meta.items() if name != "meta_sha256"}) == meta.pop(
        "meta_sha256"
    )
    check_meta(meta, CheckpointPaths(Path("d2"), 2))
    check_can_resume(Checkpoint(CheckpointPaths(Path("d2"), 2), meta))


def test_settings_of_an_import_are_checked() -> None:
    check_settings({"stage": "sft", "tag": "d4", "micro_batch_size": None, "learning_rates": META["learning_rates"]})
    wrong: list[dict[str, Any]] = [{"tag": "../x"}, {"tag": 7}, {"learning_rates": {"a": 1}}, {"micro_batch_size": "x"}]
    for settings in wrong:
        with pytest.raises(UserError, match=next(iter(settings))):
            check_settings(settings)
