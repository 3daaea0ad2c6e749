"""Attention backends for CUDA, in a separate module since importing it loads torch.compile. See `attention`."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lmchat.model.attention import attention


def flash(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """The windowed flash kernel inside torch (half precision).

    With torch 2.11, which does not support grouped queries here, shared key heads are repeated.
    """
    batch, length = q.shape[:2]
    if window >= length - 1:
        return attention(q, k, v)
    from torch.nn.attention.varlen import varlen_attn

    starts = torch.arange(0, (batch + 1) * length, length, dtype=torch.int32, device=q.device)
    options: dict[str, Any] = {}
    if (group := q.size(2) // k.size(2)) > 1:
        if _varlen_takes_grouped_queries():
            options["enable_gqa"] = True
        else:
            k, v = (x.repeat_interleave(group, dim=2) for x in (k, v))
    out: Any = varlen_attn(
        q.flatten(0, 1),
        k.flatten(0, 1),
        v.flatten(0, 1),
        cu_seq_q=starts,
        cu_seq_k=starts,
        max_q=length,
        max_k=length,
        window_size=(window, 0),
        **options,
    )
    return out.view_as(q)


@torch.compiler.assume_constant_result
def _varlen_takes_grouped_queries() -> bool:
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters


def flex(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """FlexAttention with a block mask, compiled."""
    mask = _block_mask(q.size(1), window, q.device)
    heads = [x.transpose(1, 2) for x in (q, k, v)]
    out: Tensor = _compiled_flex()(*heads, block_mask=mask, enable_gqa=q.size(2) != k.size(2))
    return out.transpose(1, 2)


@cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


@torch.compiler.disable  # compiled code would ignore the cache
@cache
def _block_mask(length: int, window: int, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (query - key <= window)

    with torch.inference_mode(False):  # Evaluation may build the mask first; training must be able to use it.
        return create_block_mask(visible, None, None, length, length, device=str(device))
