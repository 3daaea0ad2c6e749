"""Sampling parameters, and sampling of tokens with random numbers per sample, so that batching does not matter."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lmchat.losses import LOGIT_SOFTCAP, softcap
from lmchat.model.config import VOCAB_MULTIPLE
from lmchat.option_checks import check_count
from lmchat.types import UserError

BLOCK = VOCAB_MULTIPLE
"""Number of logits per block in searches of a cumulative distribution."""

GROUP = 8
"""Number of logits per group in the search for the largest ones; a divisor of `BLOCK`."""


@dataclass(frozen=True)
class SamplingParams:
    """Sampling parameters of a prompt.

    Attributes:
        num_samples: number of completions.
        max_new_tokens: maximum number of tokens of a completion, forced tokens included.
        temperature: divides the logits; 0 is greedy decoding.
        top_k: sample from the k most likely tokens; None is the whole vocabulary.
        seed: seed of the random numbers; each sample has its own stream.
        stop_tokens: ids that end a completion; None is ``<|assistant_end|>`` and ``<|bos|>``.
        calculator: answer calculator calls.
        logprobs: return the log-probability of every sampled token.
        top_logprobs: with ``logprobs``, return those of this many most likely tokens too.
        top_p: sample from the smallest set of tokens (after ``top_k``) whose probabilities add up to it; None or 1 is
            all of them.

    Raises:
        UserError: a value is out of range.
    """

    num_samples: int = 1
    max_new_tokens: int = 256
    temperature: float = 1.0
    top_k: int | None = 50
    seed: int = 42
    stop_tokens: Collection[int] | None = None
    calculator: bool = True
    logprobs: bool = False
    top_logprobs: int = 0
    top_p: float | None = None

    def __post_init__(self) -> None:
        check_count(None, 1, num_samples=self.num_samples, max_new_tokens=self.max_new_tokens)
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UserError(f"temperature is {self.temperature}; give 0 for greedy decoding, or a positive number")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k is {self.top_k}; give at least 1, or null to sample from the whole vocabulary")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; give more than 0 and at most 1, or null for no limit")
        if self.seed < 0:
            raise UserError(f"seed is {self.seed}; it must not be negative")

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0 or self.top_k == 1


def sample_uniforms(seed: int, sample: int, count: int) -> npt.NDArray[np.float64]:
    """Random numbers of sample number ``sample`` of a prompt, one per token: (count,) float64 in [0, 1).

    Each (seed, sample) has its own PCG64 stream, so they do not depend on the batch; a larger ``count`` only appends.
    """
    return np.random.Generator(np.random.PCG64((seed, sample))).random(count)


class SamplingMode(NamedTuple):
    """Features of the sampler that a batch needs, known on the host.

    Attributes:
        greedy: whether any row takes the most likely token.
        top_k: maximum number of candidates of a row, 0 if no row has a limit.
        full: whether any row samples from the whole vocabulary.
        logprobs: whether log-probabilities are needed.
        top_logprobs: number of most likely tokens whose log-probabilities are needed.
        mixed: whether rows differ in their number of candidates, or any row has a top_p.
    """

    greedy: bool
    top_k: int
    full: bool
    logprobs: bool
    top_logprobs: int = 0
    mixed: bool = True

    @classmethod
    def of(cls, params: Iterable[SamplingParams], vocab_size: int) -> SamplingMode:
        """The mode for rows with these parameters."""
        params = list(params)
        limits = [candidates(each, vocab_size) for each in params]
        return cls(
            greedy=any(each.is_greedy for each in params),
            top_k=max(limits, default=0),
            full=any(not each.is_greedy and not limit for each, limit in zip(params, limits, strict=True)),
            logprobs=any(each.logprobs for each in params),
            top_logprobs=min(max((each.top_logprobs for each in params if each.logprobs), default=0), vocab_size),
            mixed=len(set(limits)) > 1 or any(each.top_p is not None for each in params),
        )

    def rounded(self, vocab_size: int) -> SamplingMode:
        """One of few modes that serve these rows too: with numbers rounded up to powers of two."""
        top_k, top_logprobs = (
            min(1 << (number - 1).bit_length(), vocab_size) if number else 0
            for number in (self.top_k, self.top_logprobs)
        )
        return self._replace(top_k=top_k, top_logprobs=top_logprobs, mixed=self.mixed or top_k > self.top_k)


def candidates(params: SamplingParams, vocab_size: int) -> int:
    """Number of most likely tokens that are sampled from; 0 for the whole vocabulary and for greedy decoding."""
    if params.is_greedy:
        return 0
    limit = min(params.top_k or vocab_size, vocab_size)
    return limit if limit < vocab_size or (params.top_p or 1) < 1 else 0


class RowParams(NamedTuple):
    """Sampling parameters of the rows of a batch, each (rows,).

    Attributes:
        temperature: float64; 1 for greedy rows.
        top_k: int64 number of candidates, see `candidates`.
        top_p: float64.
        greedy: bool.
        uniforms: float64 in [0, 1), the random number of the next token.
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    greedy: Tensor
    uniforms: Tensor


class Sampled(NamedTuple):
    """Sampled tokens.

    Attributes:
        tokens: (rows,) int64 token ids, -1 where the logits are not finite.
        logprobs: (rows,) fp32 log-probabilities under the full distribution, before temperature and top-k; 0 if not
            requested.
        top_ids: (rows, top_logprobs) int64 most likely tokens, most likely first.
        top_logprobs: (rows, top_logprobs) fp32 log-probabilities of these.
    """

    tokens: Tensor
    logprobs: Tensor
    top_ids: Tensor
    top_logprobs: Tensor


def sample(raw: Tensor, vocab_size: int, mode: SamplingMode, params: RowParams) -> Sampled:
    """Samples a token per row by inverting the cumulative distribution.

    Args:
        raw: (rows, vocab) float logits before the soft cap, with columns from ``vocab_size`` on up to a multiple of
            `BLOCK`. Overwritten if fp32 or larger.
        vocab_size: number of tokens.
        mode: features needed by the rows.
        params: sampling parameters of the rows.
    """
    raw = raw.to(torch.promote_types(raw.dtype, torch.float32))
    raw[:, vocab_size:].fill_(-torch.inf)
    if mode.top_k:
        values, ids = top_values(raw, mode.top_k)
        best = values[:, 0]
        chosen = ids.gather(1, _choose_candidate(values, params, mode.mixed)).squeeze(1)
        if mode.greedy:
            # Not the first candidate: of equal logits the first token, as in a batch without candidates.
            chosen = torch.where(params.greedy, raw.max(dim=1).indices, chosen)
    else:
        best, chosen = raw.max(dim=1)
    logprobs = raw.new_zeros(len(raw))
    top_ids, top_logprobs = chosen[:, None][:, :0], raw[:, :0]
    if mode.full or mode.logprobs:
        scale = 2 * LOGIT_SOFTCAP
        # softcap(x) = scale · sigmoid(2 x / cap) - cap, as in the training loss; the constant cancels.
        capped = raw.mul_(2 / LOGIT_SOFTCAP).sigmoid_().mul_(scale)
        if mode.full:
            from_all = _choose_from_all(capped, vocab_size, params)
            is_full = (params.top_k == 0) & ~params.greedy
            chosen = torch.where(is_full, from_all, chosen) if mode.top_k or mode.greedy else from_all
        if mode.logprobs:
            picked = capped.gather(1, chosen[:, None]).squeeze(1)
            if mode.top_logprobs:
                top_logprobs, top_ids = capped[:, :vocab_size].topk(mode.top_logprobs, dim=1)
            total = capped[:, :vocab_size].exp_().sum(dim=1).log()
            logprobs, top_logprobs = picked - total, top_logprobs - total[:, None]
    return Sampled(torch.where(best.isfinite(), chosen, -1), logprobs, top_ids, top_logprobs)


def top_values(raw: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest ``count`` values of each row in descending order, and their columns; rows must be whole blocks.

    Columns are divided into groups of `GROUP`; the values are in the ``count`` groups with the largest maxima, so only
    these are searched. The columns of a group are far apart, which makes their maximum fast.
    """
    rows, columns = raw.shape
    groups = columns // GROUP
    if 2 * count > groups:
        return raw.topk(count, dim=1)
    grouped = raw.view(rows, GROUP, groups)
    # Sorted, so that columns stay in order and ties are resolved as in the whole row.
    best = grouped.amax(dim=1).topk(count, dim=1, sorted=False).indices.sort(dim=1).values
    values, places = grouped.gather(2, best[:, None].expand(-1, GROUP, -1)).flatten(1).topk(count, dim=1)
    return values, places // count * groups + best.gather(1, places % count)


def _choose_candidate(values: Tensor, params: RowParams, mixed: bool) -> Tensor:
    """(rows, 1) which of the candidates (rows, k), raw logits in descending order, in float64."""
    capped = softcap(values)
    weights = ((capped - capped[:, :1].double()) / params.temperature[:, None]).exp()
    last: Tensor | int = values.size(1) - 1
    if mixed:
        allowed = torch.arange(values.size(1), device=values.device) < params.top_k[:, None]
        weights = torch.where(allowed, weights, 0)
        cumulative = weights.cumsum(dim=1)
        # The smallest set of candidates whose weights reach top_p, at least the first.
        kept = allowed & ((cumulative - weights) < params.top_p[:, None] * cumulative[:, -1:])
        weights = torch.where(kept, weights, 0)
        last = (kept.sum(dim=1, keepdim=True) - 1).clamp(min=0)
    cumulative = weights.cumsum(dim=1)
    threshold = params.uniforms[:, None] * cumulative[:, -1:]
    # Rounding may raise a threshold close to the total up to the total.
    return (cumulative <= threshold).sum(dim=1, keepdim=True).clamp(max=last)


def _choose_from_all(capped: Tensor, vocab_size: int, params: RowParams) -> Tensor:
    """Samples tokens (rows,) from soft-capped logits (rows, columns), padding included.

    Finds the block, then the token in it. Sums over blocks are float64 to preserve the probability of the tail of a
    large vocabulary.
    """
    best = capped[:, :vocab_size].amax(dim=1, keepdim=True)
    temperature = params.temperature[:, None].to(capped.dtype).clamp(min=1e-30)
    weights = (capped - best).div_(temperature).exp_()
    weights[:, vocab_size:] = 0
    blocks = weights.view(len(weights), -1, BLOCK)
    sums = blocks.sum(dim=2).double()
    cumulative = sums.cumsum(dim=1)
    threshold = params.uniforms[:, None] * cumulative[:, -1:]
    block = (cumulative <= threshold).sum(dim=1, keepdim=True).clamp(max=sums.size(1) - 1)
    rest = threshold - (cumulative - sums).gather(1, block)
    inner = blocks.gather(1, block[:, :, None].expand(-1, -1, BLOCK)).squeeze(1).double().cumsum(dim=1)
    place = (inner <= rest).sum(dim=1, keepdim=True).clamp(max=BLOCK - 1)
    return (block * BLOCK + place).squeeze(1).clamp(max=vocab_size - 1)
