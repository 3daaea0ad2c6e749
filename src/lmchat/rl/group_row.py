"""Attention for samples with a common prompt, which the network reads once."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lmchat.model.attention import attend_banded, attention, window_mask

HIDDEN = 2**31 - 1
"""Position of padding: no token sees it."""


class GroupRow:
    """Attention within one row, a prompt followed by its samples: an `lmchat.model.attention.AttentionCache`.

    A token of a sample sees the prompt and the earlier tokens of the same sample. For one model call.

    Args:
        prompt: number of tokens of the prompt; may be 0.
        samples: number of tokens of each sample.
    """

    def __init__(self, prompt: int, samples: Sequence[int], device: torch.device) -> None:
        self._prompt = prompt
        lengths, columns = np.array(samples), np.arange(max(samples))
        inside = columns < lengths[:, None]
        table = np.where(inside, (prompt + lengths.cumsum() - lengths)[:, None] + columns, 0)
        queries = np.where(inside, prompt + columns, HIDDEN)
        of_prompt = np.arange(prompt)
        keys = np.concatenate([np.tile(of_prompt, (len(samples), 1)), queries], axis=1)
        positions = np.concatenate([of_prompt, queries[inside]])[None]

        def on_device(values: npt.NDArray[np.int64]) -> Tensor:
            return torch.from_numpy(values).to(device, non_blocking=True)

        self.positions, self._inside = on_device(positions), on_device(np.flatnonzero(inside))
        self._table, self._queries, self._keys = on_device(table), on_device(queries), on_device(keys)
        self._masks: dict[int, Tensor] = {}

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

    def _samples(self, x: Tensor) -> Tensor:
        """(samples, longest, heads, head_dim) of x (1, N, heads, head_dim), padded on the right."""
        return x[0].index_select(0, self._table.flatten()).unflatten(0, self._table.shape)

    def _mask(self, window: int) -> Tensor:
        """(samples, 1, longest, prompt + longest) bool, True where a token is seen."""
        if window not in self._masks:
            self._masks[window] = window_mask(self._queries, self._keys, window)[:, None]
        return self._masks[window]
