"""Sampling parameters, and choosing tokens from logits with random numbers that belong to the sample, not the batch."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from lmchat.types import UserError


@dataclass(frozen=True)
class SamplingParams:
    """How the completions of a prompt are sampled.

    Attributes:
        num_samples: completions of the prompt.
        max_new_tokens: maximum number of tokens of a completion, forced tokens included.
        temperature: divides the logits; 0 is greedy decoding.
        top_k: sample from the k most likely tokens; None is the whole vocabulary.
        seed: seed of the prompt's random numbers; its samples draw from streams of their own.
        stop_tokens: ids that end a completion; None is ``<|assistant_end|>`` and ``<|bos|>``.
        calculator: answer calculator calls.
        logprobs: return the log-probability of every sampled token.

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

    def __post_init__(self) -> None:
        for name in ("num_samples", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UserError(f"temperature is {self.temperature}; give 0 for greedy decoding, or a positive number")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k is {self.top_k}; give at least 1, or null to sample from the whole vocabulary")
        if self.seed < 0:
            raise UserError(f"seed is {self.seed}; it must not be negative")


def sample_uniforms(seed: int, sample: int, count: int) -> npt.NDArray[np.float64]:
    """Random numbers of sample number ``sample`` of a prompt, one per token.

    They depend on nothing else, and a larger ``count`` only appends to them, so a sample draws the same numbers
    whatever else is in its batch. Each (seed, sample) has its own PCG64 stream.

    Returns:
        (count,) float64 in [0, 1).
    """
    return np.random.Generator(np.random.PCG64((seed, sample))).random(count)


@dataclass(frozen=True)
class Sampler:
    """Temperature and top-k sampling by inversion of the cumulative distribution.

    Attributes:
        temperature: divides the logits; 0 takes the most likely token.
        top_k: the softmax runs over the k largest logits only; None for all.
    """

    temperature: float = 1.0
    top_k: int | None = 50

    def __call__(self, logits: Tensor, uniforms: Tensor) -> Tensor:
        """Chooses a token per row, in float64, so that the tail of a large vocabulary keeps its probability.

        Args:
            logits: (B, vocab) float.
            uniforms: (B,) numbers in [0, 1).

        Returns:
            (B,) int64 token ids; -1 where logits are not finite.
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
