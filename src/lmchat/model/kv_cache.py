"""Cache of keys and values for decoding."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from lmchat.model.attention import attend_banded, attention, window_mask
from lmchat.model.config import GPTConfig
from lmchat.types import UserError


class AttentionCache(Protocol):
    """Interface between the model and a cache of keys and values."""

    def context_end(self, length: int) -> int:
        """Length of the longest context after adding ``length`` tokens per row."""

    def positions(self, length: int) -> Tensor:
        """(B, T) int64 positions of the next ``length`` tokens of each row, on the device of the model."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
        """Adds k and v (B, T, kv heads, head_dim) of new tokens; returns the attention of q to all visible tokens."""

    def advance(self, length: int) -> None:
        """Called once all layers have added ``length`` tokens per row."""


class KVCache:
    """Simple cache of keys and values for a batch of rows, each at its own position.

    The engine uses `lmchat.generation.kv_pool` instead. Prefill by calling the model with (B, T) ids, then decode with
    (B, 1). To prefill prompts of different lengths, pad them on the right and set `lengths` to the true lengths
    afterwards; the next tokens overwrite the padding.

    Args:
        config: shape of the network.
        batch_size: number of rows.
        max_len: maximum number of tokens per row.
        dtype: dtype of keys and values.
        device: device of keys and values.

    Attributes:
        lengths: (B,) int64 tokens per row, on the host, so that no step waits for the device.
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
        self._incoming: _Incoming | None = None

    @property
    def batch_size(self) -> int:
        """Rows."""
        return self.keys.size(1)

    @property
    def max_len(self) -> int:
        """Maximum number of tokens per row."""
        return self.keys.size(3)

    @property
    def longest(self) -> int:
        """Number of tokens in the longest row."""
        return int(self.lengths.max())

    def context_end(self, length: int) -> int:
        """Length of the longest row after adding ``length`` tokens."""
        return self.longest + length

    def positions(self, length: int) -> Tensor:
        """(B, T) positions of the next `length` tokens of each row, on the cache's device."""
        return self._expect(length).positions

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
        """Adds k and v (B, T, kv heads, head_dim) of new tokens; returns the attention of q to all visible tokens."""
        incoming = self._expect(q.size(1))
        self.keys[layer][incoming.rows, :, incoming.positions] = k
        self.values[layer][incoming.rows, :, incoming.positions] = v
        if incoming.end == q.size(1):
            return attend_banded(q, k, v, window)
        start, mask = incoming.visible(window)
        keys = self.keys[layer, :, :, start : incoming.end].transpose(1, 2)
        values = self.values[layer, :, :, start : incoming.end].transpose(1, 2)
        return attention(q, keys, values, mask)

    def advance(self, length: int) -> None:
        """Adds `length` to the length of every row; called after all layers have added their keys and values."""
        self.lengths = self.lengths + length
        self._incoming = None

    def _expect(self, length: int) -> _Incoming:
        """The `_Incoming` of the current model call, shared by all layers until `advance`."""
        if self._incoming is None or self._incoming.length != length:
            if (end := self.longest + length) > self.max_len:
                raise UserError(f"{end} tokens do not fit a KV cache of {self.max_len}; make max_len larger")
            self._incoming = _Incoming(self.lengths, length, self.keys.device)
        return self._incoming


class _Incoming:
    """Positions and masks of the tokens of one model call, shared by all layers.

    Attributes:
        positions: (B, T) int64.
        rows: (B, 1) int64, to index together with positions.
        end: number of positions after adding the tokens.
    """

    def __init__(self, lengths: Tensor, length: int, device: torch.device) -> None:
        self.length = length
        self.positions = (lengths[:, None] + torch.arange(length)).to(device, non_blocking=True)
        self.rows = torch.arange(len(lengths), device=device)[:, None]
        self.first = int(lengths.min())
        self.end = int(lengths.max()) + length
        self._visible: dict[int, tuple[int, Tensor]] = {}

    def visible(self, window: int) -> tuple[int, Tensor]:
        """The first position that any row sees, and the mask (B, 1, T, positions) of the positions from there on."""
        if window not in self._visible:
            start = max(0, self.first - window)
            held = torch.arange(start, self.end, device=self.positions.device)
            self._visible[window] = start, window_mask(self.positions, held, window)[:, None]
        return self._visible[window]
