"""Round trip of Lightning's checkpoint dictionary, with one and several ranks."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint_meta import META
from lmchat.checkpoint.layout import CheckpointPaths
from lmchat.checkpoint.load import DamagedCheckpoint
from lmchat.strategies.checkpoint_io import LMChatCheckpointIO
from lmchat.types import UserError


def dump(rank: int = 0) -> dict[str, Any]:
    """A checkpoint dictionary as from Lightning and `StepCheckpoint`, with values that depend on the rank."""
    return {
        "epoch": 0,
        "global_step": 5,
        "pytorch-lightning_version": "2.6.6",
        "loops": {"fit_loop": {}, "validate_loop": {}},
        "state_dict": {"net.lm_head.weight": torch.arange(6.0).reshape(2, 3).to(torch.bfloat16)},
        "optimizer_states": [{"state": {0: {"step": 5, "exp_avg": torch.full((3,), float(rank))}}, "param_groups": []}],
        "lr_schedulers": [],
        "callbacks": {"Monitor": {"best": torch.tensor(1.5), "steps": 5}},
        "Data": {"position": [1, 2, None]},
        "rng": {"torch": torch.tensor([rank])},
        "meta": META,
        "hyper_parameters": {"anything": object()},
    }


def save(paths: CheckpointPaths, world_size: int) -> None:
    ios = [LMChatCheckpointIO(rank, world_size) for rank in range(world_size)]
    for rank, io in enumerate(ios):
        io.save_checkpoint(dump(rank), paths.model)
    for io in ios:
        io.writer.wait()


def assert_equal(got: Any, expected: Any) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.fixture
def paths(tmp_path: Path) -> CheckpointPaths:
    return CheckpointPaths(tmp_path, 5)


def expected(rank: int = 0) -> dict[str, Any]:
    return {key: value for key, value in dump(rank).items() if key not in ("meta", "hyper_parameters", "loops")}


@pytest.mark.parametrize("name", ["model", "meta"])
def test_round_trip(name: str, paths: CheckpointPaths) -> None:
    save(paths, 1)
    loaded = LMChatCheckpointIO().load_checkpoint(getattr(paths, name), weights_only=True)
    assert loaded.pop("evaluated") is True  # not noted by the step's evaluation
    assert loaded.keys() == expected().keys()
    for key, value in expected().items():
        if key != "pytorch-lightning_version":
            assert_equal(loaded[key], value)


def test_the_model_file_is_a_state_dict_of_the_network(paths: CheckpointPaths) -> None:
    save(paths, 1)
    assert torch.load(paths.model, weights_only=True).keys() == {"lm_head.weight"}


def test_each_rank_loads_its_own_part(paths: CheckpointPaths) -> None:
    save(paths, 3)
    for rank in range(3):
        loaded = LMChatCheckpointIO(rank, 3).load_checkpoint(paths.meta)
        assert_equal(loaded["optimizer_states"], dump(rank)["optimizer_states"])
        assert_equal(loaded["rng"], dump(rank)["rng"])


@pytest.mark.parametrize("world_size", [1, 2])
def test_another_world_size_loads_all_parts(world_size: int, paths: CheckpointPaths) -> None:
    save(paths, 3)
    loaded = LMChatCheckpointIO(0, world_size).load_checkpoint(paths.meta)
    assert_equal(loaded["optimizer_states"], [tuple(dump(rank)["optimizer_states"][0] for rank in range(3))])
    assert "rng" not in loaded
    assert_equal(loaded["Data"], dump()["Data"])


def test_damaged_files_of_other_ranks_are_ignored(paths: CheckpointPaths) -> None:
    save(paths, 2)
    paths.optimizer(1).write_bytes(b"")
    LMChatCheckpointIO(0, 2).load_checkpoint(paths.meta)
    with pytest.raises(DamagedCheckpoint, match=r"optim_000005_rank1.pt is truncated"):
        LMChatCheckpointIO(1, 2).load_checkpoint(paths.meta)


def test_training_continues_during_a_background_write(paths: CheckpointPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file contains the state at the time of the call, although it is written after the state has changed."""
    changed = threading.Event()
    torch_save = torch.save

    def late(*args: Any) -> None:
        assert changed.wait(10)
        torch_save(*args)

    monkeypatch.setattr(torch, "save", late)
    io, state = LMChatCheckpointIO(), dump()
    io.save_checkpoint(state, paths.model)
    for tensor in (state["state_dict"]["net.lm_head.weight"], state["optimizer_states"][0]["state"][0]["exp_avg"]):
        tensor.fill_(7)
    state["callbacks"]["Monitor"].clear()
    changed.set()
    io.teardown()
    loaded = LMChatCheckpointIO().load_checkpoint(paths.meta)
    assert_equal(loaded["state_dict"], dump()["state_dict"])
    assert_equal(loaded["optimizer_states"], dump()["optimizer_states"])
    assert_equal(loaded["callbacks"], dump()["callbacks"])


def test_a_write_stops_waiting_for_ranks_that_died(paths: CheckpointPaths) -> None:
    io = LMChatCheckpointIO(0, 2)
    io.save_checkpoint(dump(), paths.model)
    io.peer_timeout_seconds = 0.1
    with pytest.raises(UserError, match=r"receipt_000005_rank1.json did not appear"):
        io.writer.wait()
    assert not paths.meta.exists()
