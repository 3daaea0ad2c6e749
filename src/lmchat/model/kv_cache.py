"""Keys and values of tokens already read, so that each new token costs one step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lmchat.model.attention import attend, masked_attention, window_mask
from lmchat.model.config import GPTConfig
from lmchat.types import UserError


class KVCache:
    """Keys and values of every layer for a batch of rows, each row at its own position.

    Prefill by calling the model on (B, T) ids, then decode by calling it on (B, 1). Prompts of different lengths are
    padded on the right and prefilled together; setting `lengths` to the true ones afterwards makes the next tokens
    overwrite the padding. `select` repeats, drops or reorders rows: a prompt is prefilled once for all its samples.

    lengths: (B,) int64 on the host, tokens held per row; on the host so that no step waits for the device.
    """

    def __init__(
        self,
        config: GPTConfig,
        batch_size: int,
        max_len: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (config.n_layer, batch_size, config.n_kv_head, max_len, config.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.lengths = torch.zeros(batch_size, dtype=torch.int64)

    @property
    def batch_size(self) -> int:
        """Rows."""
        return self.keys.size(1)

    @property
    def max_len(self) -> int:
        """Tokens a row can hold."""
        return self.keys.size(3)

    @property
    def longest(self) -> int:
        """Tokens in the fullest row."""
        return int(self.lengths.max())

    def positions(self, length: int) -> Tensor:
        """(B, T) positions of the next `length` tokens of each row, on the cache's device."""
        positions = self.lengths[:, None] + torch.arange(length)
        return positions.to(self.keys.device, non_blocking=True)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
        """Add the new tokens' k and v (B, T, kv heads, head_dim), return q's attention over all that is held."""
        length = q.size(1)
        end = self.longest + length
        if end > self.max_len:
            raise UserError(f"{end} tokens do not fit a KV cache of {self.max_len}; make max_len larger")
        positions = self.positions(length)
        rows = torch.arange(self.batch_size, device=q.device)[:, None]
        self.keys[layer][rows, :, positions] = k
        self.values[layer][rows, :, positions] = v
        if end == length:
            return attend(q, k, v, window)
        start = max(0, int(self.lengths.min()) - window)
        mask = window_mask(positions, torch.arange(start, end, device=q.device), window)
        keys = self.keys[layer, :, :, start:end].transpose(1, 2)
        values = self.values[layer, :, :, start:end].transpose(1, 2)
        return masked_attention(q, keys, values, mask[:, None])

    def advance(self, length: int) -> None:
        """Count `length` more tokens in every row; the model calls it once all layers have added theirs."""
        self.lengths = self.lengths + length

    def select(self, rows: Sequence[int] | Tensor, max_len: int | None = None) -> KVCache:
        """A new cache of the given rows, in that order, repeats allowed, with room for `max_len` tokens."""
        rows = torch.as_tensor(rows, dtype=torch.int64)
        selected = object.__new__(KVCache)
        selected.lengths = self.lengths[rows.cpu()]
        selected.keys = _select(self.keys, rows, selected.longest, max_len or self.max_len)
        selected.values = _select(self.values, rows, selected.longest, max_len or self.max_len)
        return selected

    def drop(self, rows: Sequence[int]) -> list[int]:
        """Remove the given rows in place; the last rows move into their places, so that the cost is that of the gaps.

        Returns, for each row now held, the index it had.
        """
        dropped = set(rows)
        kept = self.batch_size - len(dropped)
        order = list(range(kept))
        gaps = [row for row in order if row in dropped]
        moved = [row for row in range(kept, self.batch_size) if row not in dropped]
        if moved:
            length = self.longest
            for held in (self.keys, self.values):
                held[:, gaps, :, :length] = held[:, moved, :, :length]
            self.lengths[gaps] = self.lengths[moved]
        for gap, row in zip(gaps, moved, strict=True):
            order[gap] = row
        self.keys, self.values, self.lengths = self.keys[:, :kept], self.values[:, :kept], self.lengths[:kept]
        return order


def _select(held: Tensor, rows: Tensor, length: int, max_len: int) -> Tensor:
    layers, _, heads, _, head_dim = held.shape
    out = held.new_zeros(layers, len(rows), heads, max_len, head_dim)
    out[:, :, :, :length] = held[:, rows.to(held.device), :, :length]
    return out
