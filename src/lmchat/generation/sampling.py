"""Choosing tokens from logits with random numbers that belong to the sample, not to the batch it runs in."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from lmchat.types import UserError


def sample_uniforms(seed: int, sample: int, count: int) -> npt.NDArray[np.float64]:
    """(count,) random numbers in [0, 1), one per token of sample number `sample` of a prompt with this seed.

    They depend on nothing else, and a larger count only adds to their end: whoever shares the batch and however long it
    runs, the same sample draws the same numbers. Each (seed, sample) has its own PCG64 stream.
    """
    return np.random.Generator(np.random.PCG64((seed, sample))).random(count)


@dataclass(frozen=True)
class Sampler:
    """Temperature and top-k sampling by inversion of the cumulative distribution.

    temperature: divides the logits; 0 takes the likeliest token.
    top_k: the softmax runs over the k largest logits only; None for all.

    Raises `UserError` for a negative or non-finite temperature and for top_k below 1.
    """

    temperature: float = 1.0
    top_k: int | None = 50

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UserError(f"temperature is {self.temperature}; give 0 for the likeliest token, or a positive number")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k is {self.top_k}; give at least 1, or null to sample from the whole vocabulary")

    def __call__(self, logits: Tensor, uniforms: Tensor) -> Tensor:
        """Token ids (B,) for logits (B, vocab) and one number in [0, 1) per row (B,); -1 where logits are not finite.

        In float64, so that the tail of a large vocabulary keeps its share.
        """
        if self.temperature == 0 or self.top_k == 1:
            best, ids = logits.max(dim=-1)
            return ids.masked_fill(~best.isfinite(), -1)
        candidates: Tensor | None = None
        if self.top_k is not None and self.top_k < logits.size(-1):
            logits, candidates = logits.topk(self.top_k, dim=-1)
        best = logits.amax(dim=-1, keepdim=True).double()
        cumulative = ((logits - best) / self.temperature).exp().cumsum(dim=-1)
        threshold = uniforms.to(cumulative)[:, None] * cumulative[:, -1:]
        # Rounding may carry a threshold next to the total up to it.
        choice = (cumulative <= threshold).sum(dim=-1, keepdim=True).clamp(max=logits.size(-1) - 1)
        chosen = choice if candidates is None else candidates.gather(-1, choice)
        return chosen.masked_fill(~best.isfinite(), -1).squeeze(-1)
