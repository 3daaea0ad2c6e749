"""Causal attention within a window. One signature, several backends, chosen by running them.

``attend(q, k, v, window)``: q (B, T, heads, head_dim); k, v (B, T, kv heads, head_dim); a query at t sees the keys
max(0, t - window)...t, window + 1 of them. Returns (B, T, heads, head_dim). Scores are scaled by 1/√head_dim.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Attend(Protocol):
    """Causal attention within a window."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor: ...


def attend(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """The reference: plain causal attention where the window covers the row, an explicit mask where it does not."""
    length = q.size(1)
    if window >= length - 1:
        return _scaled_dot_product(q, k, v, None)
    positions = torch.arange(length, device=q.device)
    return masked_attention(q, k, v, window_mask(positions, positions, window))


def window_mask(query_positions: Tensor, key_positions: Tensor, window: int) -> Tensor:
    """True where a query sees a key: (..., queries) and (..., keys) positions give (..., queries, keys)."""
    distance = query_positions.unsqueeze(-1) - key_positions.unsqueeze(-2)
    return (distance >= 0) & (distance <= window)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention where `mask` (queries, keys) or (B, 1, queries, keys) is True; shapes as `attend`, keys may be more."""
    return _scaled_dot_product(q, k, v, mask)


def _scaled_dot_product(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None,
        enable_gqa=q.size(2) != k.size(2),
    )
    return out.transpose(1, 2)
