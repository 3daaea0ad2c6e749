"""Reference implementation of CORE's scores: one option at a time, with all logits. Works with any causal model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lmchat.evaluation.core import Example
from lmchat.evaluation.core_scoring import OptionScore, scores_of

LogitsOf = Callable[[Tensor], Tensor]
"""Returns logits (1, T, vocab_size) of ids (1, T) int64."""


@torch.inference_mode()
def score_plainly(logits_of: LogitsOf, questions: Sequence[Example]) -> list[list[OptionScore]]:
    """Scores each example's options, one option at a time."""
    results = []
    for example in questions:
        scores = []
        for option, (start, end) in zip(example.options, example.spans, strict=True):
            logits = logits_of(torch.tensor([option]))[0, start - 1 : end - 1]
            scores += scores_of(logits, [option[start:end]], torch.Tensor.float)
        results.append(scores)
    return results
