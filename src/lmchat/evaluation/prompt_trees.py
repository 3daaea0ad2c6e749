"""Packs examples into one row of tokens without padding; the common prefix of an example's options is read once.

The linear layers process one row of all tokens. Attention runs twice per layer: within the prefixes, and from the
options' own tokens to their prefix and to themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

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
        return len(self.prefix) + sum(map(len, self.branches))


class PackedTrees:
    """Trees packed into one row, with their attention: an `lmchat.model.attention.AttentionCache` for one model call.

    Args:
        trees: the trees; attention is cheapest if their prefixes have similar lengths.
        device, num_layers: those of the network.

    Attributes:
        ids: (1, N) int64, the tokens of all trees.
        positions: (1, N) int64, their positions within their options.
        predicting: (M,) int64, the positions in ``ids`` that predict scored tokens. The last layer takes only their
            queries.
        order: (scored tokens,) int64, for each scored token of each branch of each tree the index in ``predicting``.
    """

    def __init__(self, trees: Sequence[PromptTree], device: torch.device, num_layers: int) -> None:
        ids: list[int] = []
        positions: list[int] = []
        numbers: list[int] = []  # of the branches; −1 for prefixes
        prefixes: list[range] = []
        branches: list[list[range]] = []
        for tree in trees:
            parts = []
            for number, tokens in enumerate((tree.prefix, *tree.branches), start=-1):
                start = 0 if number < 0 else len(tree.prefix)
                parts.append(range(len(ids), len(ids) + len(tokens)))
                ids += tokens
                positions += range(start, start + len(tokens))
                numbers += [number] * len(tokens)
            prefixes.append(parts[0])
            branches.append(parts[1:])
        predicting = [
            [
                place
                for branch, (start, end) in zip(own, tree.spans, strict=True)
                for place in [*prefix, *branch][start - 1 : end - 1]
            ]
            for tree, prefix, own in zip(trees, prefixes, branches, strict=True)
        ]
        distinct = [sorted(set(places)) for places in predicting]
        flat = [place for places in distinct for place in places]
        index = {place: number for number, place in enumerate(flat)}
        self.predicting = torch.tensor(flat).to(device)
        self.order = torch.tensor([index[place] for places in predicting for place in places]).to(device)
        self.ids = torch.tensor([ids]).to(device)
        self.positions = torch.tensor([positions]).to(device)
        self._prefix = _PaddedIndex(prefixes, device)
        self._branch = _PaddedIndex([[place for branch in own for place in branch] for own in branches], device)
        self._numbers = torch.tensor([numbers]).to(device)
        self._picked = _PaddedIndex([[index[place] for place in places] for places in distinct], device)
        self._last_layer = num_layers - 1
        self._masks: dict[tuple[int, bool], Tensor] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
        """Attention of q (1, N, heads, head_dim) to k and v (1, N, kv heads, head_dim) within each option.

        In the last layer q is (1, M, heads, head_dim), the queries of ``predicting``.
        """
        out = torch.empty_like(q)
        prefix, branch = self._prefix, self._branch
        keys, values = prefix.gather(k), prefix.gather(v)
        picked = layer == self._last_layer
        if prefix.width and not picked:
            prefix.scatter(attend_banded(prefix.gather(q), keys, values, window), out)
        queries = self._picked if picked else branch
        if queries.width:
            keys, values = torch.cat([keys, branch.gather(k)], 1), torch.cat([values, branch.gather(v)], 1)
            queries.scatter(attention(queries.gather(q), keys, values, self._mask(window, picked)), out)
        return out

    def _mask(self, window: int, picked: bool) -> Tensor:
        """(trees, 1, queries, prefix and branch tokens) bool: what branch tokens, or those of ``predicting``, see."""
        if (window, picked) not in self._masks:
            prefix, branch = self._prefix, self._branch
            rows = (self.positions, self._numbers)
            of_queries = [
                self._picked.gather(row[:, self.predicting]) if picked else branch.gather(row) for row in rows
            ]
            of_keys = [torch.cat([prefix.gather(row), branch.gather(row)], 1) for row in rows]
            distance = of_queries[0][:, :, None] - of_keys[0][:, None]
            # A token of a prefix, number −1, is seen by all; one of a branch by those of the same branch.
            same = (of_keys[1][:, None] == -1) | (of_queries[1][:, :, None] == of_keys[1][:, None])
            valid = torch.cat([prefix.valid, branch.valid], 1)[:, None]
            self._masks[window, picked] = (valid & same & (distance >= 0) & (distance <= window))[:, None]
        return self._masks[window, picked]


class _PaddedIndex:
    """Positions in the packed row as a padded table with one line per tree."""

    def __init__(self, places: Sequence[Sequence[int]], device: torch.device) -> None:
        lines = [torch.tensor(line, dtype=torch.int64) for line in places]
        table = pad_sequence(lines, batch_first=True, padding_value=-1)
        self.valid = (table >= 0).to(device)
        self._table = table.clamp(min=0).to(device)
        self._line, self._column = (each.to(device) for each in torch.where(table >= 0))
        self._places = torch.cat(lines).to(device)

    @property
    def width(self) -> int:
        """Length of the longest line."""
        return self._table.size(1)

    def gather(self, x: Tensor) -> Tensor:
        """(trees, width, ...) of x (1, N, ...)."""
        return x[0, self._table]

    def scatter(self, values: Tensor, out: Tensor) -> None:
        """Writes values (trees, width, heads, head_dim) to their positions in out (1, N, heads, head_dim)."""
        out[0, self._places] = values[self._line, self._column]
