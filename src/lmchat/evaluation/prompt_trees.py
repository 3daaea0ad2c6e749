"""Packs examples into one row of tokens without padding; the common prefix of an example's options is read once.

The linear layers process one row of all tokens. Attention runs twice per layer: within the prefixes, and from the
options' own tokens to their prefix and to themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lmchat.evaluation.core import Example, common_prefix
from lmchat.model.attention import attend_banded, attention


@dataclass(frozen=True)
class PromptTree:
    """The tokens of an example that the network has to read, as a tree.

    Attributes:
        prefix: common prefix of all options.
        branches: remaining tokens of each distinct option, up to the last one that a scored token is predicted from.
        spans: start and end (exclusive) of the scored tokens of each distinct option.
        targets: the scored tokens of each distinct option.
        option_branch: index of the branch of each option of the example.
    """

    prefix: list[int]
    branches: list[list[int]]
    spans: list[tuple[int, int]]
    targets: list[list[int]]
    option_branch: list[int]

    @classmethod
    def of(cls, example: Example) -> PromptTree:
        distinct = dict(zip(map(tuple, example.options), example.spans, strict=True))
        read = [option[: end - 1] for option, (_, end) in distinct.items()]
        shared = common_prefix(read)
        number = {option: index for index, option in enumerate(distinct)}
        return cls(
            prefix=list(read[0][:shared]),
            branches=[list(option[shared:]) for option in read],
            spans=list(distinct.values()),
            targets=[list(option[slice(*span)]) for option, span in distinct.items()],
            option_branch=[number[tuple(option)] for option in example.options],
        )

    @property
    def num_tokens(self) -> int:
        """Number of tokens to read."""
        return len(self.prefix) + sum(map(len, self.branches))


class PackedTrees:
    """Trees packed into one row, with their attention: an `lmchat.model.kv_cache.AttentionCache` for one model call.

    Args:
        trees: the trees; attention is cheapest if their prefixes have similar lengths.
        device: device of the network.

    Attributes:
        ids: (1, N) int64, the tokens of all trees.
        predicting: for each branch of each tree, in order, the positions in ``ids`` that predict its scored tokens.
    """

    def __init__(self, trees: Sequence[PromptTree], device: torch.device) -> None:
        ids: list[int] = []
        positions: list[int] = []
        prefixes: list[range] = []
        branches: list[list[range]] = []
        for tree in trees:
            prefixes.append(range(len(ids), len(ids) + len(tree.prefix)))
            ids += tree.prefix
            positions += range(len(tree.prefix))
            branches.append([])
            for branch in tree.branches:
                branches[-1].append(range(len(ids), len(ids) + len(branch)))
                ids += branch
                positions += range(len(tree.prefix), len(tree.prefix) + len(branch))
        self.predicting = [
            [*prefix, *branch][start - 1 : end - 1]
            for tree, prefix, own in zip(trees, prefixes, branches, strict=True)
            for branch, (start, end) in zip(own, tree.spans, strict=True)
        ]
        self.ids = torch.tensor([ids]).to(device)
        self._positions = torch.tensor([positions]).to(device)
        self._end = max(positions) + 1
        self._prefix = _PaddedIndex(prefixes, device)
        self._branch = _PaddedIndex([[place for branch in own for place in branch] for own in branches], device)
        numbers = [[number for number, branch in enumerate(own) for _ in branch] for own in branches]
        self._branch_number = _padded(numbers, -1).to(device)
        self._masks: dict[int, Tensor] = {}

    def context_end(self, length: int) -> int:
        """The length of the longest option."""
        return self._end

    def positions(self, length: int) -> Tensor:
        """(1, N) positions of the tokens within their options."""
        return self._positions

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
        """Attention of q (1, N, heads, head_dim) to k and v (1, N, kv heads, head_dim) within each option."""
        out = torch.empty_like(q)
        prefix, branch = self._prefix, self._branch
        keys, values = prefix.gather(k), prefix.gather(v)
        if prefix.width:
            prefix.scatter(attend_banded(prefix.gather(q), keys, values, window), out)
        if branch.width:
            keys, values = torch.cat([keys, branch.gather(k)], 1), torch.cat([values, branch.gather(v)], 1)
            branch.scatter(attention(branch.gather(q), keys, values, self._mask(window)), out)
        return out

    def advance(self, length: int) -> None:
        """Does nothing: the cache is for one call."""

    def _mask(self, window: int) -> Tensor:
        """Attention mask of the branches' tokens: (trees, 1, branch tokens, prefix and branch tokens) bool."""
        if window not in self._masks:
            own, before = self._branch.take(self._positions), self._prefix.take(self._positions)
            distance = own[:, :, None] - torch.cat([before, own], 1)[:, None, :]
            same = self._branch_number[:, :, None] == self._branch_number[:, None, :]
            of_prefix = self._prefix.valid[:, None, :].expand(-1, own.size(1), -1)
            visible = torch.cat([of_prefix, same], 2) & (distance >= 0) & (distance <= window)
            self._masks[window] = visible[:, None]
        return self._masks[window]


class _PaddedIndex:
    """Positions in the packed row as a padded table with one line per tree."""

    def __init__(self, places: Sequence[Sequence[int]], device: torch.device) -> None:
        table = _padded(places, -1)
        self.valid = (table >= 0).to(device)
        self._table = table.clamp(min=0).to(device)
        self._line, self._column = (each.to(device) for each in torch.where(table >= 0))
        self._places = torch.tensor([place for line in places for place in line], dtype=torch.int64).to(device)

    @property
    def width(self) -> int:
        """Length of the longest line."""
        return self._table.size(1)

    def take(self, row: Tensor) -> Tensor:
        """(trees, width) entries of row (1, N)."""
        return row[0, self._table]

    def gather(self, x: Tensor) -> Tensor:
        """(trees, width, heads, head_dim) of x (1, N, heads, head_dim)."""
        return x[0, self._table]

    def scatter(self, values: Tensor, out: Tensor) -> None:
        """Writes values (trees, width, heads, head_dim) to their positions in out (1, N, heads, head_dim)."""
        out[0, self._places] = values[self._line, self._column]


def _padded(lines: Sequence[Sequence[int]], fill: int) -> Tensor:
    table = torch.full((len(lines), max(map(len, lines))), fill, dtype=torch.int64)
    for row, line in zip(table, lines, strict=True):
        row[: len(line)] = torch.tensor(line, dtype=torch.int64)
    return table
