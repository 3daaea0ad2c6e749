"""Sampled frequencies compared with the softmax, and the independence of the random numbers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import reference_engine
from lmchat.generation.sampling import (
    RowParams,
    Sampled,
    SamplingMode,
    SamplingParams,
    candidates,
    sample,
    sample_uniforms,
    top_values,
)
from lmchat.losses import softcap
from lmchat.types import UserError


def _logits(rows: int, vocab: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3


def _sample(
    raw: torch.Tensor, params: SamplingParams | list[SamplingParams], uniforms: torch.Tensor, rounded: bool = False
) -> Sampled:
    """`sample` for raw logits (rows, vocab), padded to whole blocks as a model's head does."""
    rows, vocab = raw.shape
    all_params = [params] * rows if isinstance(params, SamplingParams) else params
    padded = torch.nn.functional.pad(raw, (0, -vocab % 64), value=1000.0)
    row_params = RowParams(
        temperature=torch.tensor([each.temperature or 1.0 for each in all_params], dtype=torch.float64),
        top_k=torch.tensor([candidates(each, vocab) for each in all_params]),
        top_p=torch.tensor([each.top_p or 1.0 for each in all_params], dtype=torch.float64),
        greedy=torch.tensor([each.is_greedy for each in all_params]),
        uniforms=uniforms.double(),
    )
    mode = SamplingMode.of(all_params, vocab)
    return sample(padded, vocab, mode.rounded(vocab) if rounded else mode, row_params)


def _expected_probabilities(raw: np.ndarray, params: SamplingParams) -> np.ndarray:
    scaled = 15 * np.tanh(raw.astype(np.float64) / 15) / params.temperature
    if params.top_k is not None and params.top_k < len(scaled):
        scaled[np.argsort(-scaled)[params.top_k :]] = -np.inf
    weights = np.exp(scaled - scaled.max())
    weights /= weights.sum()
    if params.top_p is not None:
        order = np.argsort(-weights)
        before = np.cumsum(weights[order]) - weights[order]
        weights[order[before >= params.top_p]] = 0
    return weights / weights.sum()


def test_greedy_matches_the_reference(fixtures: Path) -> None:
    measured = json.loads((fixtures / "engine.json").read_text())["sampling"]
    logits, uniforms = torch.tensor(measured["logits"]), torch.rand(4)
    assert _sample(logits, SamplingParams(temperature=0, top_k=None), uniforms)[0].tolist() == measured["greedy"]
    assert _sample(logits, SamplingParams(top_k=1), uniforms)[0].tolist() == measured["top_1"]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize(("top_k", "top_p"), [(None, None), (2, None), (7, None), (1000, None), (None, 0.8), (7, 0.9)])
def test_frequencies_follow_the_softmax(temperature: float, top_k: int | None, top_p: float | None) -> None:
    from scipy import stats  # takes seconds, which each worker would spend if it were above

    draws, vocab = 20_000, 90
    logits = _logits(1, vocab)
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p)
    ids = _sample(logits.expand(draws, vocab), params, torch.from_numpy(sample_uniforms(3, 0, draws))).tokens
    expected = _expected_probabilities(logits[0].numpy(), params) * draws
    observed = np.bincount(ids.numpy(), minlength=vocab)
    assert not observed[expected == 0].any()
    common = expected >= 5
    rare = (observed[~common].sum(), expected[~common].sum())
    observed, expected = np.append(observed[common], rare[0]), np.append(expected[common], rare[1])
    kept = expected > 0
    if kept.sum() > 1:
        assert stats.chisquare(observed[kept], expected[kept]).pvalue > 1e-3


def test_each_token_owns_its_share_of_the_unit_interval() -> None:
    """Evenly spaced numbers hit each token as often as its probability says, to within one."""
    count, params = 50_000, SamplingParams(top_k=None)
    logits = _logits(1, 80)
    uniforms = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    observed = np.bincount(_sample(logits.expand(count, 80), params, uniforms)[0].numpy(), minlength=80)
    expected = _expected_probabilities(logits[0].numpy(), params) * count
    # The weights are fp32, and 80 rounding errors add up.
    assert np.abs(observed - expected).max() <= 1 + 1e-6 * count


@pytest.mark.parametrize("sampler", [(0.0, 50), (1.0, None), (1.3, 9), (0.7, 50), (1.0, 5000)])
def test_samples_match_the_reference_sampler(sampler: tuple[float, int | None]) -> None:
    temperature, top_k = sampler
    raw, uniforms = _logits(200, 5000), torch.from_numpy(sample_uniforms(1, 0, 200))
    expected = reference_engine.Sampler(temperature, top_k)(softcap(raw), uniforms)
    params = SamplingParams(temperature=temperature, top_k=top_k, logprobs=True, top_logprobs=4)
    sampled = _sample(raw, params, uniforms)
    assert torch.equal(sampled.tokens, expected)
    exact = softcap(raw.double()).log_softmax(-1)
    assert torch.allclose(sampled.logprobs.double(), exact.gather(-1, expected[:, None]).squeeze(-1), atol=1e-5)
    assert torch.allclose(sampled.top_logprobs.double(), exact.topk(4).values, atol=1e-5)
    assert torch.allclose(exact.gather(-1, sampled.top_ids), exact.topk(4).values, atol=1e-5)


def test_a_row_does_not_depend_on_the_settings_of_other_rows() -> None:
    kinds = [
        SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p)
        for temperature in (0, 0.8, 1.0)
        for top_k in (None, 1, 3, 50)
        for top_p in (None, 0.5, 1.0)
    ]
    raw, uniforms = _logits(len(kinds), 700), torch.from_numpy(sample_uniforms(2, 0, len(kinds)))
    together = _sample(raw, kinds, uniforms).tokens
    alone = [int(_sample(raw[[i]], kind, uniforms[[i]])[0]) for i, kind in enumerate(kinds)]
    assert together.tolist() == alone


@pytest.mark.parametrize("top_k", [None, 1, 2, 5, 50, 64, 70, 250])
@pytest.mark.parametrize("top_logprobs", [0, 1, 3])
def test_rounded_numbers_of_candidates_give_the_same_tokens(top_k: int | None, top_logprobs: int) -> None:
    raw, uniforms = _logits(500, 200), torch.rand(500, generator=torch.Generator().manual_seed(1))
    params = SamplingParams(temperature=0.9, top_k=top_k, logprobs=True, top_logprobs=top_logprobs)
    exact, rounded = (_sample(raw, params, uniforms, rounded) for rounded in (False, True))
    assert rounded.tokens.equal(exact.tokens) and rounded.logprobs.equal(exact.logprobs)
    assert rounded.top_ids[:, :top_logprobs].equal(exact.top_ids)
    modes = {SamplingMode.of([replace(params, top_k=k)], 200).rounded(200) for k in range(1, 200)}
    assert len(modes) < 20


def test_greedy_rows_take_the_first_of_equal_logits_in_any_batch() -> None:
    raw, uniforms = _logits(60, 700).round(), torch.rand(60, dtype=torch.float64)
    expected = raw.numpy().argmax(axis=1)
    greedy = SamplingParams(temperature=0)
    for other in (greedy, SamplingParams(top_k=None), SamplingParams(top_k=50), SamplingParams(top_k=3, top_p=0.5)):
        tokens = _sample(raw, [greedy, other] * 30, uniforms).tokens.numpy()
        assert (tokens[::2] == expected[::2]).all()


@pytest.mark.parametrize("count", [1, 5, 50, 200])
def test_top_values_equal_those_of_the_full_row(count: int) -> None:
    raw = _logits(20, 64 * 130)
    values, ids = top_values(raw, count)
    assert torch.equal(values, raw.topk(count, dim=1).values)
    assert torch.equal(raw.gather(1, ids), values)


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
@pytest.mark.parametrize("top_k", [None, 5])
def test_ends_of_the_unit_interval(uniform: float, top_k: int | None) -> None:
    raw = _logits(64, 5000)
    ids = _sample(raw, SamplingParams(top_k=top_k), torch.full((64,), uniform, dtype=torch.float64)).tokens
    assert ((ids >= 0) & (ids < 5000)).all()
    if uniform == 0 and top_k is not None:
        assert torch.equal(ids, raw.argmax(dim=-1))


@pytest.mark.parametrize("top_k", [None, 50])
@pytest.mark.parametrize("temperature", [1e-6, 1e-300, 5e-324])
def test_temperature_near_zero_is_greedy(temperature: float, top_k: int | None) -> None:
    raw = _logits(50, 100)
    params = SamplingParams(temperature=temperature, top_k=top_k)
    ids = _sample(raw, params, torch.rand(50, dtype=torch.float64)).tokens
    assert torch.equal(ids, raw.argmax(dim=-1))


@pytest.mark.parametrize("params", [SamplingParams(temperature=0), SamplingParams(top_k=5), SamplingParams(top_k=None)])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_give_minus_one(params: SamplingParams, bad: float) -> None:
    raw = _logits(3, 40)
    raw[1, 17] = bad
    ids = _sample(raw, params, torch.rand(3)).tokens
    assert (ids < 0).tolist() == [False, True, False]


def test_uniforms_belong_to_seed_and_sample() -> None:
    from scipy import stats

    assert np.array_equal(sample_uniforms(7, 2, 10), sample_uniforms(7, 2, 1000)[:10])
    streams = [sample_uniforms(seed, sample, 1000) for seed in range(20) for sample in range(20)]
    assert len({stream.tobytes() for stream in streams}) == 400
    correlations = np.corrcoef(streams) - np.eye(400)
    assert np.abs(correlations).max() < 0.2
    assert stats.kstest(np.concatenate(streams), "uniform").pvalue > 1e-3


def test_uniforms_are_the_same_everywhere() -> None:
    """Rollouts with the same seed must be equal on all machines and versions."""
    assert sample_uniforms(42, 0, 2).tolist() == [0.7739560485559633, 0.4388784397520523]


@pytest.mark.parametrize("temperature", [-1.0, float("nan"), float("inf")])
def test_bad_temperature(temperature: float) -> None:
    with pytest.raises(UserError, match="temperature"):
        SamplingParams(temperature=temperature)


@pytest.mark.parametrize("top_k", [0, -5])
def test_bad_top_k(top_k: int) -> None:
    with pytest.raises(UserError, match="top_k"):
        SamplingParams(top_k=top_k)


@pytest.mark.parametrize("top_p", [0.0, 1.1, float("nan")])
def test_bad_top_p(top_p: float) -> None:
    with pytest.raises(UserError, match="top_p"):
        SamplingParams(top_p=top_p)
