"""Behaviour common to all stages: copying batches, and timing attention on a GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data._utils.pin_memory import pin_memory

from lmchat.evaluation.evaluator import EvalBatch
from lmchat.stages import base
from lmchat.stages.data_module import StageDataModule
from lmchat.stages.pretrain import PretrainModule
from lmchat.stages.rl import GRPOModule
from lmchat.types import Batch


def test_batches_are_not_copied_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_stream(*_: object) -> None:
        raise AssertionError("a CPU has no streams")

    monkeypatch.setattr(torch.cuda, "stream", no_stream)
    monkeypatch.setattr(torch.cuda, "current_stream", no_stream)
    batch = Batch(inputs=torch.arange(6).view(2, 3), targets=torch.arange(6).view(2, 3))
    moved = StageDataModule(micro_batch_size=2).transfer_batch_to_device(batch, torch.device("cpu"), 0)
    assert moved.keys() == batch.keys()
    assert all(moved[name] is batch[name] for name in ("inputs", "targets"))


@pytest.mark.parametrize(("mode", "expected"), [("auto", True), (True, True), (False, False)])
def test_compilation_is_decided_before_the_run_is_planned(
    mode: Any, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An automatic micro-batch is chosen before, when only the network is on the GPU, not the module."""
    monkeypatch.setattr(base, "compiler_works", lambda device_type: True)
    module = PretrainModule(depth=2, compile=mode)
    module.net = SimpleNamespace(device=torch.device("cuda"))
    assert module.compiles_blocks() == expected


def test_batches_of_evaluators_are_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self + 1)
    evaluator: Any = object()
    ids, questions = torch.zeros(2, dtype=torch.int64), ["a question"]
    pinned = pin_memory(EvalBatch(evaluator, {"inputs": ids, "loss_tokens": 3}))
    assert pinned.evaluator is evaluator
    assert pinned.data["inputs"].tolist() == [1, 1] and pinned.data["loss_tokens"] == 3
    assert pin_memory(EvalBatch(evaluator, questions)).data == questions


@pytest.mark.parametrize("rank", [0, 1])
def test_rank_0_times_attention_for_all_ranks(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[dict[int, str]] = []
    strategy = SimpleNamespace(broadcast=lambda chosen: chosen or {16: "broadcast"})
    monkeypatch.setattr(PretrainModule, "trainer", SimpleNamespace(global_rank=rank, strategy=strategy))
    monkeypatch.setattr(base, "choose_by_timing", lambda net, rows, documents, file: {16: f"{rows} {documents}"})
    monkeypatch.setattr(base, "use_backends", lambda net, names: used.append(names))
    for device, attention in (("cuda", "auto"), ("cuda", "flash"), ("cpu", "auto")):
        module = PretrainModule(depth=2, attention=attention)
        module.net = SimpleNamespace(device=torch.device(device))
        module.plan = SimpleNamespace(micro_batch_size=8, mask_documents=True)
        module._time_attention()
    assert used == [{16: "8 True"} if rank == 0 else {16: "broadcast"}]


@pytest.mark.parametrize(("device", "kind", "released"), [
    ("cuda", PretrainModule, True), ("cpu", PretrainModule, False), ("cuda", GRPOModule, False),
])  # fmt: skip
def test_evaluation_leaves_a_gpus_memory_to_training(
    device: str, kind: Any, released: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not in reinforcement learning, where each step samples."""
    calls: list[bool] = []
    policy = SimpleNamespace(release_memory=lambda: calls.append(True))
    monkeypatch.setattr(kind, "policy", policy)
    module = kind(**({"depth": 2} if kind is PretrainModule else {}))
    module.net = SimpleNamespace(device=torch.device(device))
    module.on_validation_end()
    assert bool(calls) == released
