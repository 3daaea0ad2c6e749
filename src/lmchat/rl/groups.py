"""Groups of sampled and graded answers to a question, and the micro-batches that are trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lmchat.generation.sequence import Completion
from lmchat.rl.advantages import group_advantages
from lmchat.types import IGNORE_INDEX, Rollout

WIDTH_MULTIPLE = 16
"""Widths of micro-batches are padded to multiples of this: few shapes to compile, and products that FP8 can take."""


@dataclass(frozen=True)
class Group:
    """The samples of one question.

    Attributes:
        prompt: token ids of the question.
        completions: the samples, with log-probabilities.
        rewards: (samples,) float32.
    """

    prompt: Sequence[int]
    completions: Sequence[Completion]
    rewards: Tensor

    @property
    def advantages(self) -> Tensor:
        """(samples,) float32."""
        return group_advantages(self.rewards)

    @property
    def num_tokens(self) -> int:
        """Number of sampled tokens; forced ones do not count."""
        return sum(sum(completion.mask) for completion in self.completions)

    @property
    def width(self) -> int:
        """Input tokens of the longest sample."""
        return len(self.prompt) + max(len(completion.ids) for completion in self.completions) - 1


@dataclass(frozen=True)
class _Row:
    """A sample to be trained on."""

    group: Group
    completion: Completion
    advantage: float

    @property
    def width(self) -> int:
        return len(self.group.prompt) + len(self.completion.ids) - 1


def micro_batches(groups: Sequence[Group], pad_id: int) -> list[Rollout]:
    """Rearranges the samples of a step into as many micro-batches as there are groups, with little padding.

    Samples without advantage have no gradient and are left out. The others are sorted by length and fill micro-batches
    up to the size of the largest group; the last micro-batches may be empty. The gradients of the step are those of one
    micro-batch per group, up to the order of summation.

    Args:
        groups: the groups of a step, of equal numbers of samples.
        pad_id: token id of the padding.

    Returns:
        The micro-batches, the widest first.
    """
    rows = [
        _Row(group, completion, advantage)
        for group in groups
        for completion, advantage in zip(group.completions, group.advantages.tolist(), strict=True)
        if advantage
    ]
    rows.sort(key=lambda row: row.width, reverse=True)
    max_tokens = max(len(group.completions) * _padded(group.width) for group in groups)
    batches, start = [], 0
    for _ in groups:
        width = _padded(rows[start].width) if start < len(rows) else WIDTH_MULTIPLE
        end = min(len(rows), start + max_tokens // width)
        batches.append(_collate(rows[start:end], width, pad_id))
        start = end
    assert start == len(rows)
    return batches


def _padded(width: int) -> int:
    return -(-width // WIDTH_MULTIPLE) * WIDTH_MULTIPLE


def _collate(rows: Sequence[_Row], width: int, pad_id: int) -> Rollout:
    """A micro-batch of rows. Prompt, padding and forced tokens are not targets.

    The stop token of a sample is one; the reference leaves it out, so that it never trains when to stop.
    """
    inputs = torch.full((len(rows), width), pad_id)
    targets = torch.full((len(rows), width), IGNORE_INDEX)
    logprobs = torch.zeros(len(rows), width)
    for index, row in enumerate(rows):
        prompt, completion = row.group.prompt, row.completion
        inputs[index, : row.width] = torch.tensor([*prompt, *completion.ids][:-1])
        sampled = slice(len(prompt) - 1, row.width)
        ids, mask = torch.tensor(completion.ids), torch.tensor(completion.mask, dtype=torch.bool)
        targets[index, sampled] = torch.where(mask, ids, IGNORE_INDEX)
        logprobs[index, sampled] = torch.tensor(completion.logprobs, dtype=torch.float32)
    return Rollout(
        inputs=inputs,
        targets=targets,
        advantages=torch.tensor([row.advantage for row in rows]),
        group_tokens=torch.tensor([row.group.num_tokens for row in rows]),
        logprobs=logprobs,
    )
