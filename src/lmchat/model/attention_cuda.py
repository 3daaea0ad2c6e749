"""Attention backends for CUDA, in a separate module since importing it loads torch.compile. See `attention`."""

import inspect
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from lmchat.model.attention import attention, document_ids


def flash(q: Tensor, k: Tensor, v: Tensor, window: int, starts: Tensor | None) -> Tensor:
    """The windowed flash kernel inside torch (half precision).

    Documents cost nothing: the kernel takes sequences of different lengths, and reads rows or documents as such. It
    takes grouped queries: with torch 2.11 as they are, with later versions by an option.
    """
    batch, length = q.shape[:2]
    if window >= length - 1 and starts is None:
        return attention(q, k, v)
    from torch.nn.attention.varlen import varlen_attn

    if starts is None:
        starts = torch.arange(0, (batch + 1) * length, length, dtype=torch.int32, device=q.device)
    options: dict[str, Any] = {}
    if q.size(2) != k.size(2) and _varlen_has_option_for_grouped_queries():
        options["enable_gqa"] = True
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
def _varlen_has_option_for_grouped_queries() -> bool:
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters


def flex(q: Tensor, k: Tensor, v: Tensor, window: int, starts: Tensor | None) -> Tensor:
    """FlexAttention with a block mask, compiled."""
    rows, length = q.shape[:2]
    mask = _block_mask(length, window, q.device) if starts is None else _document_mask(rows, length, window, starts)
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
    return _create_mask(None, length, device, window)


@torch.compiler.disable
@lru_cache(maxsize=2)  # masks of the last batch, for S and L; keys are compared by identity
def _document_mask(rows: int, length: int, window: int, starts: Tensor) -> Any:
    return _create_mask(document_ids(starts, rows, length), length, starts.device, window)


def _create_mask(documents: Tensor | None, length: int, device: torch.device, window: int) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    def visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        near = (query >= key) & (query - key <= window)
        return near if documents is None else near & (documents[row, query] == documents[row, key])

    with torch.inference_mode(False):  # Evaluation may create the mask first, and training must be able to use it.
        rows = None if documents is None else len(documents)
        return create_block_mask(visible, rows, None, length, length, device=str(device))
