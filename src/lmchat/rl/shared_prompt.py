"""Attention for samples with a common prompt, which the network reads once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lmchat.model.attention import attend_banded, attention, window_mask

HIDDEN = torch.iinfo(torch.int32).max
"""Position of padding: no token sees it."""


class SharedPrompt:
    """Attention within one row, a prompt followed by its samples: an `lmchat.model.kv_cache.AttentionCache`.

    A token of a sample sees the prompt and the earlier tokens of the same sample. For one model call.

    Args:
        prompt: number of tokens of the prompt; may be 0.
        samples: number of tokens of each sample.
        device: device of the network.
    """

    def __init__(self, prompt: int, samples: Sequence[int], device: torch.device) -> None:
        self._prompt = prompt
        lengths = torch.tensor(samples)
        self._end = prompt + max(samples)
        columns = torch.arange(max(samples))
        inside = columns < lengths[:, None]
        table = torch.where(inside, (prompt + lengths.cumsum(0) - lengths)[:, None] + columns, 0)
        positions = torch.where(inside, prompt + columns, HIDDEN)
        of_prompt = torch.arange(prompt)
        self._row = torch.cat([of_prompt, positions[inside]])[None].to(device)
        self._inside = inside.flatten().nonzero()[:, 0].to(device)
        self._table = table.to(device)
        self._queries = positions.to(device)
        self._keys = torch.cat([of_prompt.expand(len(samples), -1), positions], dim=1).to(device)
        self._masks: dict[int, Tensor] = {}

    def context_end(self, length: int) -> int:
        """Number of tokens of the prompt and the longest sample."""
        return self._end

    def positions(self, length: int) -> Tensor:
        """(1, N) positions of the tokens: those of each sample follow the prompt's."""
        return self._row

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
        """Attention of q (1, N, heads, head_dim) to k and v (1, N, kv heads, head_dim)."""
        q_prompt, k_prompt, v_prompt = (x[:, : self._prompt] for x in (q, k, v))
        keys, values = (
            torch.cat([shared.expand(len(self._table), -1, -1, -1), self._samples(own)], dim=1)
            for shared, own in ((k_prompt, k), (v_prompt, v))
        )
        out = attention(self._samples(q), keys, values, self._mask(window))
        out = out.flatten(0, 1).index_select(0, self._inside)[None]
        return torch.cat([attend_banded(q_prompt, k_prompt, v_prompt, window), out], dim=1) if self._prompt else out

    def advance(self, length: int) -> None:
        """Does nothing: the cache is for one call."""

    def _samples(self, x: Tensor) -> Tensor:
        """(samples, longest, heads, head_dim) of x (1, N, heads, head_dim), padded on the right."""
        return x[0].index_select(0, self._table.flatten()).unflatten(0, self._table.shape)

    def _mask(self, window: int) -> Tensor:
        """(samples, 1, longest, prompt + longest) bool, True where a token is seen."""
        if window not in self._masks:
            self._masks[window] = window_mask(self._queries, self._keys, window)[:, None]
        return self._masks[window]
