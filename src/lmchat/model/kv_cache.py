"""Keys and values of tokens already read, so that each new token costs one step."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from lmchat.model.attention import attend_banded, attention, window_mask
from lmchat.model.config import GPTConfig
from lmchat.types import UserError


class AttentionCache(Protocol):
    """What the model needs of a cache of keys and values."""

    def context_end(self, length: int) -> int:
        """The length of the longest context once ``length`` more tokens per row are in."""

    def positions(self, length: int) -> Tensor:
        """(B, T) int64 positions of the next ``length`` tokens of each row, on the device of the model."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
        """Adds the new tokens' k and v (B, T, kv heads, head_dim); returns q's attention over all that it can see."""

    def advance(self, length: int) -> None:
        """Called once all layers have added ``length`` tokens per row."""


class KVCache:
    """Keys and values of every layer for a batch of rows, each row at its own position: the simplest cache.

    The engine has its own, see `lmchat.generation.kv_pool`. Prefill by calling the model on (B, T) ids, then decode by
    calling it on (B, 1). Prompts of different lengths are padded on the right and prefilled together; setting `lengths`
    to the true ones afterwards makes the next tokens overwrite the padding.

    Args:
        config: shape of the network.
        batch_size: number of rows.
        max_len: tokens a row can hold.
        dtype: dtype of keys and values.
        device: where they are.

    Attributes:
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
        self._incoming: _Incoming | None = None

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

    def context_end(self, length: int) -> int:
        """Length of the fullest row once ``length`` more tokens are in."""
        return self.longest + length

    def positions(self, length: int) -> Tensor:
        """(B, T) positions of the next `length` tokens of each row, on the cache's device."""
        return self._expect(length).positions

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
        """Add the new tokens' k and v (B, T, kv heads, head_dim), return q's attention over all that is held."""
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
        """Count `length` more tokens in every row; the model calls it once all layers have added theirs."""
        self.lengths = self.lengths + length
        self._incoming = None

    def _expect(self, length: int) -> _Incoming:
        """Worked out by the first to ask in a model call, until `advance` ends it."""
        if self._incoming is None or self._incoming.length != length:
            if (end := self.longest + length) > self.max_len:
                raise UserError(f"{end} tokens do not fit a KV cache of {self.max_len}; make max_len larger")
            self._incoming = _Incoming(self.lengths, length, self.keys.device)
        return self._incoming


class _Incoming:
    """Where the tokens of one model call go and what they see, which all layers share.

    positions: (B, T). rows: (B, 1), to index with positions. end: positions held once they are in.
    """

    def __init__(self, lengths: Tensor, length: int, device: torch.device) -> None:
        self.length = length
        self.positions = (lengths[:, None] + torch.arange(length)).to(device, non_blocking=True)
        self.rows = torch.arange(len(lengths), device=device)[:, None]
        self.first = int(lengths.min())
        self.end = int(lengths.max()) + length
        self._visible: dict[int, tuple[int, Tensor]] = {}

    def visible(self, window: int) -> tuple[int, Tensor]:
        """The first position any row sees, and which from there to `end` each token sees: (B, 1, T, positions)."""
        if window not in self._visible:
            start = max(0, self.first - window)
            held = torch.arange(start, self.end, device=self.positions.device)
            self._visible[window] = start, window_mask(self.positions, held, window)[:, None]
        return self._visible[window]
