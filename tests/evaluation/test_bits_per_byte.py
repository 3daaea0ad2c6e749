"""Bits per byte compared with the reference implementation, and their defining properties."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lmchat.evaluation.bits_per_byte import BitsPerByte, BitsPerByteEvaluator
from lmchat.model.config import GPTConfig
from lmchat.model.gpt import GPT
from lmchat.types import IGNORE_INDEX
from random_weights import with_random_weights


@pytest.fixture(scope="module")
def recorded(fixtures: Path) -> dict[str, torch.Tensor]:
    with np.load(fixtures / "bpb.npz") as arrays:
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


def test_sums_match_the_reference_batch_by_batch(recorded: dict[str, torch.Tensor]) -> None:
    metric = BitsPerByte(recorded["token_bytes"])
    for nll, targets, expected in zip(recorded["nll"], recorded["targets"], recorded["bpb"], strict=True):
        metric.update(nll, targets)
        assert float(metric.compute()) == pytest.approx(float(expected), rel=1e-6)


def test_sums_of_two_ranks_equal_one_rank(recorded: dict[str, torch.Tensor]) -> None:
    ranks = [BitsPerByte(recorded["token_bytes"]) for _ in range(2)]
    for step, (nll, targets) in enumerate(zip(recorded["nll"], recorded["targets"], strict=True)):
        ranks[step % 2].update(nll, targets)
    for name, reduction in ranks[0]._reductions.items():
        total = reduction(torch.stack([getattr(rank, name) for rank in ranks]))
        setattr(ranks[0], name, total)
    ranks[0]._computed = None
    assert float(ranks[0].compute()) == pytest.approx(float(recorded["bpb"][-1]), rel=1e-6)


def test_a_uniform_model_over_bytes_needs_eight_bits() -> None:
    targets = torch.arange(256)
    nll = torch.full((256,), math.log(256))
    assert float(BitsPerByte(torch.ones(256, dtype=torch.int32))(nll, targets)) == pytest.approx(8)


def test_special_tokens_and_ignored_targets_do_not_count() -> None:
    token_bytes = torch.tensor([0, 1, 3])
    nll = torch.tensor([[100.0, 1.0], [2.0, 50.0]])
    targets = torch.tensor([[0, 1], [2, IGNORE_INDEX]])
    assert float(BitsPerByte(token_bytes)(nll, targets)) == pytest.approx(3 / (4 * math.log(2)))


def test_nan_at_ignored_targets_has_no_effect() -> None:
    nll = torch.tensor([math.nan, 2.0])
    assert float(BitsPerByte(torch.tensor([1, 2]))(nll, torch.tensor([IGNORE_INDEX, 1]))) == pytest.approx(
        1 / math.log(2)
    )


def test_no_text_gives_infinity() -> None:
    assert float(BitsPerByte(torch.tensor([0, 5]))(torch.ones(3), torch.tensor([0, 0, IGNORE_INDEX]))) == math.inf


def test_sums_stay_exact_over_a_long_evaluation() -> None:
    metric = BitsPerByte(torch.tensor([1]))
    targets, nll = torch.zeros(1000, dtype=torch.int64), torch.full((1000,), 0.1)
    for _ in range(2000):
        metric.update(nll, targets)
    assert int(metric.num_bytes) == 2_000_000
    assert float(metric.compute()) == pytest.approx(float(nll[0]) / math.log(2), rel=1e-9)


@pytest.mark.parametrize("parts", [1, 2, 3, 4])
def test_parts_of_a_batch_keep_its_documents(parts: int) -> None:
    config = GPTConfig(sequence_len=32, vocab_size=70, n_layer=2, n_head=2, n_kv_head=2, n_embd=32)
    policy: Any = SimpleNamespace(net=with_random_weights(GPT(config), 0.3, embeddings=1.0))
    ids = torch.randint(70, (4, 33), generator=torch.Generator().manual_seed(0))
    starts = torch.tensor([0, 5, 32, 50, 64, 96, 100, 127, 128, 128, 128], dtype=torch.int32)
    batch: Any = {"inputs": ids[:, :-1], "targets": ids[:, 1:], "document_starts": starts}
    values = []
    for pieces in (1, parts):
        evaluator = BitsPerByteEvaluator(torch.ones(70, dtype=torch.int64), lambda rank, world_size: [batch])
        for piece in evaluator.split(batch, pieces):
            assert len(piece["document_starts"]) == len(starts)
            evaluator.update(policy, piece)
        values.append(evaluator.compute()["bpb"])
    assert float(values[1]) == pytest.approx(float(values[0]), rel=1e-6)
