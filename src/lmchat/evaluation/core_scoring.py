"""Scores CORE examples: the loss of each option's tokens, and whether greedy decoding produces them.

Examples of similar length are batched, see `lmchat.evaluation.prompt_trees`. The output head runs only at scored
positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lmchat.evaluation.core import Example, Kind
from lmchat.evaluation.prompt_trees import PackedTrees, PromptTree
from lmchat.model.gpt import GPT

LogitsOf = Callable[[Tensor], Tensor]
"""Returns logits (B, T, vocab_size) for right-padded ids (B, T) int64."""

MAX_BATCH_TOKENS = 1 << 14
MAX_BATCH_TOKENS_ON_CPU = 1 << 11
"""Tokens per batch; larger batches do not fit into a CPU's caches."""


def max_batch_tokens(device: torch.device) -> int:
    """Tokens per batch on a device."""
    return MAX_BATCH_TOKENS_ON_CPU if device.type == "cpu" else MAX_BATCH_TOKENS


@dataclass(frozen=True)
class OptionScore:
    """Score of an option's tokens.

    Attributes:
        loss: mean cross-entropy, in nats.
        greedy: whether every token is the most likely one.
    """

    loss: float
    greedy: bool


def is_correct(kind: Kind, example: Example, scores: Sequence[OptionScore]) -> bool:
    """Whether the gold option has the lowest mean loss (the first minimum), or the continuation is decoded greedily."""
    if kind == "language_modeling":
        return scores[0].greedy
    losses = [score.loss for score in scores]
    return losses.index(min(losses)) == example.gold


@torch.inference_mode()
def score_plainly(logits_of: LogitsOf, questions: Sequence[Example]) -> list[list[OptionScore]]:
    """Scores each example's options, one option at a time. Works with any causal model."""
    results = []
    for example in questions:
        scores = []
        for option, (start, end) in zip(example.options, example.spans, strict=True):
            logits = logits_of(torch.tensor([option]))[0, start - 1 : end - 1]
            scores += scores_of(logits, [option[start:end]])
        results.append(scores)
    return results


@torch.inference_mode()
def score(net: GPT, questions: Sequence[Example]) -> list[list[OptionScore]]:
    """Scores each example's options; equals `score_plainly` up to the order of summation.

    Options with equal tokens get equal scores.

    Args:
        net: the network; its mode and weights do not change.
        questions: the examples, which form one batch.
    """
    trees = [PromptTree.of(example) for example in questions]
    packed = PackedTrees(trees, net.device)
    hidden = net.hidden(packed.ids, packed)[0]
    places = torch.tensor([place for branch in packed.predicting for place in branch], device=net.device)
    scores = iter(scores_of(net.logits(hidden[places]), [target for tree in trees for target in tree.targets]))
    results = []
    for tree in trees:
        by_branch = [next(scores) for _ in tree.branches]
        results.append([by_branch[branch] for branch in tree.option_branch])
    return results


def batches_by_length(questions: Sequence[Example], max_tokens: int) -> Iterator[list[int]]:
    """Yields batches of indices of examples of similar length, with at most ``max_tokens`` tokens or one example."""
    trees = [PromptTree.of(example) for example in questions]
    batch: list[int] = []
    tokens = 0
    for index in sorted(range(len(trees)), key=lambda index: -len(trees[index].prefix)):
        if batch and tokens + trees[index].num_tokens > max_tokens:
            yield batch
            batch, tokens = [], 0
        batch.append(index)
        tokens += trees[index].num_tokens
    if batch:
        yield batch


def scores_of(logits: Tensor, targets: Sequence[Sequence[int]]) -> list[OptionScore]:
    """Scores of options from logits (tokens, vocab_size), the rows of all options one after another."""
    lengths = [len(tokens) for tokens in targets]
    flat = torch.tensor([token for tokens in targets for token in tokens], device=logits.device)
    losses = F.cross_entropy(logits.float(), flat, reduction="none").cpu().split(lengths)
    greedy = (logits.argmax(dim=-1) == flat).cpu().split(lengths)
    return [OptionScore(float(loss.mean()), bool(hits.all())) for loss, hits in zip(losses, greedy, strict=True)]
