"""Sampling against the softmax it must follow, and the independence of its random numbers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from lmchat.generation.sampling import Sampler, SamplingParams, sample_uniforms
from lmchat.types import UserError


def _logits(rows: int, vocab: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3


def _expected_probabilities(logits: np.ndarray, temperature: float, top_k: int | None) -> np.ndarray:
    scaled = logits.astype(np.float64) / temperature
    if top_k is not None and top_k < len(scaled):
        scaled[np.argsort(-scaled)[top_k:]] = -np.inf
    weights = np.exp(scaled - scaled.max())
    return weights / weights.sum()


def test_greedy_as_the_reference(fixtures: Path) -> None:
    measured = json.loads((fixtures / "engine.json").read_text())["sampling"]
    logits, uniforms = torch.tensor(measured["logits"]), torch.rand(4)
    assert Sampler(temperature=0, top_k=None)(logits, uniforms).tolist() == measured["greedy"]
    assert Sampler(temperature=1, top_k=1)(logits, uniforms).tolist() == measured["top_1"]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize("top_k", [None, 2, 7, 30, 1000])
def test_frequencies_follow_the_softmax(temperature: float, top_k: int | None) -> None:
    draws, vocab = 20_000, 30
    logits = _logits(1, vocab)
    uniforms = torch.from_numpy(sample_uniforms(3, 0, draws))
    ids = Sampler(temperature, top_k)(logits.expand(draws, vocab), uniforms)
    expected = _expected_probabilities(logits[0].numpy(), temperature, top_k) * draws
    observed = np.bincount(ids.numpy(), minlength=vocab)
    assert not observed[expected == 0].any()
    common = expected >= 5
    rare = (observed[~common].sum(), expected[~common].sum())
    observed, expected = np.append(observed[common], rare[0]), np.append(expected[common], rare[1])
    kept = expected > 0
    assert stats.chisquare(observed[kept], expected[kept]).pvalue > 1e-3


def test_each_token_owns_its_share_of_the_unit_interval() -> None:
    """Evenly spaced numbers hit each token as often as its probability says, to within one."""
    count = 100_000
    logits = _logits(1, 20)
    uniforms = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    observed = np.bincount(Sampler(1.0, None)(logits.expand(count, 20), uniforms).numpy(), minlength=20)
    expected = _expected_probabilities(logits[0].numpy(), 1.0, None) * count
    assert np.abs(observed - expected).max() <= 1 + 1e-6


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
@pytest.mark.parametrize("top_k", [None, 5])
def test_ends_of_the_unit_interval(uniform: float, top_k: int | None) -> None:
    logits = _logits(64, 5000)
    ids = Sampler(1.0, top_k)(logits, torch.full((64,), uniform, dtype=torch.float64))
    assert ((ids >= 0) & (ids < 5000)).all()
    if uniform == 0 and top_k is not None:
        assert torch.equal(ids, logits.argmax(dim=-1))


@pytest.mark.parametrize("temperature", [1e-6, 1e-300, 5e-324])
def test_temperature_near_zero_is_greedy(temperature: float) -> None:
    logits = _logits(50, 100)
    ids = Sampler(temperature, 50)(logits, torch.rand(50, dtype=torch.float64))
    assert torch.equal(ids, logits.argmax(dim=-1))


@pytest.mark.parametrize("sampler", [Sampler(0), Sampler(1, 5), Sampler(1, None)])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_give_minus_one(sampler: Sampler, bad: float) -> None:
    logits = _logits(3, 40)
    logits[1, 17] = bad
    ids = sampler(logits, torch.rand(3))
    assert (ids < 0).tolist() == [False, True, False]


def test_uniforms_belong_to_seed_and_sample() -> None:
    assert np.array_equal(sample_uniforms(7, 2, 10), sample_uniforms(7, 2, 1000)[:10])
    streams = [sample_uniforms(seed, sample, 1000) for seed in range(20) for sample in range(20)]
    assert len({stream.tobytes() for stream in streams}) == 400
    correlations = np.corrcoef(streams) - np.eye(400)
    assert np.abs(correlations).max() < 0.2
    assert stats.kstest(np.concatenate(streams), "uniform").pvalue > 1e-3


def test_uniforms_are_the_same_everywhere() -> None:
    """Rollouts of one seed must repeat on another machine and in another year."""
    assert sample_uniforms(42, 0, 2).tolist() == [0.7739560485559633, 0.4388784397520523]


@pytest.mark.parametrize("temperature", [-1.0, float("nan"), float("inf")])
def test_bad_temperature(temperature: float) -> None:
    with pytest.raises(UserError, match="temperature"):
        SamplingParams(temperature=temperature)


@pytest.mark.parametrize("top_k", [0, -5])
def test_bad_top_k(top_k: int) -> None:
    with pytest.raises(UserError, match="top_k"):
        SamplingParams(top_k=top_k)
