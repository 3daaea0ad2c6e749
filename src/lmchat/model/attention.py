"""Causal attention within a window: one signature, several backends, chosen by running them.

``attend(q, k, v, window, starts)``: q (B, T, heads, head_dim); k, v (B, T, kv heads, head_dim), where consecutive query
heads share a key head; a query at t sees the keys max(0, t - window)...t, that is window + 1 of them. Scores are scaled
by 1/√head_dim. Returns (B, T, heads, head_dim).

With ``starts``, the ``document_starts`` of a `lmchat.types.Batch`, a query sees keys of its own document only.
"""

import logging
from contextlib import AbstractContextManager
from functools import cache
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lmchat.types import UserError

logger = logging.getLogger(__name__)


class Attend(Protocol):
    """Causal attention within a window; see the module."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, window: int, starts: Tensor | None = None) -> Tensor: ...


class AttentionCache(Protocol):
    """Interface between the model and a cache of keys and values.

    Attributes:
        positions: (B, T) int64 positions of the next tokens of each row, on the device of the model, within its rotary
            tables.
    """

    positions: Tensor

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
        """Adds k and v (B, T, kv heads, head_dim) of new tokens; returns the attention of q to all visible tokens."""


def attend_masked(q: Tensor, k: Tensor, v: Tensor, window: int, starts: Tensor | None = None) -> Tensor:
    """Reference implementation with an explicit mask, (T, T) or with documents (B, 1, T, T)."""
    positions = torch.arange(q.size(1), device=q.device)
    mask = window_mask(positions, positions, window)
    if starts is not None:
        documents = document_ids(starts, q.size(0), q.size(1))
        mask = mask & same_document(documents, documents)
    return attention(q, k, v, mask)


def attend_banded(q: Tensor, k: Tensor, v: Tensor, window: int, starts: Tensor | None = None) -> Tensor:
    """Blocks of queries, each with the keys it can see; work is proportional to T · window. Runs on any device.

    On a CPU, blocks of half a window are fastest: forward and backward take 0.6 to 0.8 of the time with a mask at
    T = 2 windows.
    """
    length = q.size(1)
    if window >= length - 1 and starts is None:
        return attention(q, k, v)
    documents = None if starts is None else document_ids(starts, q.size(0), length)
    positions = torch.arange(length, device=q.device)
    block = max(min(window, length) // 2, 64)
    blocks = []
    for start in range(0, length, block):
        queries, keys = slice(start, start + block), slice(max(0, start - window), start + block)
        mask = window_mask(positions[queries], positions[keys], window)
        if documents is not None:
            mask = mask & same_document(documents[:, queries], documents[:, keys])
        blocks.append(attention(q[:, queries], k[:, keys], v[:, keys], mask))
    return torch.cat(blocks, dim=1)


def attend_flash(q: Tensor, k: Tensor, v: Tensor, window: int, starts: Tensor | None = None) -> Tensor:
    """The windowed flash kernel inside torch (CUDA, half precision). Never run on a GPU so far."""
    from lmchat.model.attention_cuda import flash  # Imports torch.compile's machinery, 1.3 CPU seconds.

    return flash(q, k, v, window, starts)


def attend_cudnn(q: Tensor, k: Tensor, v: Tensor, window: int, starts: Tensor | None = None) -> Tensor:
    """cuDNN's kernel where the window is the whole row, otherwise flash. Never run on a GPU so far.

    For fixed shapes: it builds a plan for each pair of batch size and key length, in a reported 23 ms to 0.4 s.
    """
    if window < q.size(1) - 1 or starts is not None:
        return attend_flash(q, k, v, window, starts)
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return attention(q, k, v)


def attend_flex(q: Tensor, k: Tensor, v: Tensor, window: int, starts: Tensor | None = None) -> Tensor:
    """FlexAttention with a block mask, compiled (CUDA; its CPU kernel has no backward). Never run on a GPU so far."""
    from lmchat.model.attention_cuda import flex

    return flex(q, k, v, window, starts)


def window_mask(query_positions: Tensor, key_positions: Tensor, window: int) -> Tensor:
    """True where a query sees a key: (..., queries) and (..., keys) positions give (..., queries, keys)."""
    distance = query_positions.unsqueeze(-1) - key_positions.unsqueeze(-2)
    return (distance >= 0) & (distance <= window)


def document_ids(starts: Tensor, rows: int, length: int) -> Tensor:
    """The number of each token's document, (rows, length), from ``document_starts``."""
    positions = torch.arange(rows * length, device=starts.device, dtype=starts.dtype)
    return torch.searchsorted(starts, positions, right=True, out_int32=True).view(rows, length)


def same_document(query_documents: Tensor, key_documents: Tensor) -> Tensor:
    """True where query and key are of one document: (B, queries) and (B, keys) give (B, 1, queries, keys)."""
    return (query_documents.unsqueeze(-1) == key_documents.unsqueeze(-2)).unsqueeze(1)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention where `mask`, (queries, keys) or (B, 1, queries, keys), is True; causal without a mask."""
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None,
        enable_gqa=q.size(2) != k.size(2),
    )
    return out.transpose(1, 2)


def exclude_cudnn() -> AbstractContextManager[None]:
    """Context manager in which `attention` does not use cuDNN's kernel, which torch prefers on Hopper.

    Only `attend_cudnn` does, see there. The backward pass uses the kernel chosen in the forward pass.
    """
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


BACKENDS: dict[str, Attend] = {
    "flash": attend_flash,
    "cudnn": attend_cudnn,
    "flex": attend_flex,
    "banded": attend_banded,
    "masked": attend_masked,
}
"""Backends by name."""

AUTO = {"cuda": ("flash", "flex", "banded"), "cpu": ("banded",)}
"""Backends that "auto" tries on each device type before the reference."""


@cache
def choose_backend(name: str, device: torch.device, dtype: torch.dtype, head_dim: int, grouped: bool) -> str:
    """Chooses the backend: `name`, or for "auto" the first one of the device that works.

    Each candidate is run, forward and backward, and compared with the reference, since an importable kernel may not run
    on this GPU. For fixed shapes on a GPU `lmchat.model.attention_timing` chooses again. ``grouped`` is whether several
    query heads share a key head.

    Raises:
        UserError: the name is unknown, or the named backend fails.
    """
    if name != "auto" and name not in BACKENDS:
        raise UserError(f"attention is {name!r}; choose auto or one of {', '.join(BACKENDS)}")
    for candidate in AUTO.get(device.type, ()) if name == "auto" else (name,):
        failure = probe(candidate, device, dtype, head_dim, grouped)
        if failure is None:
            return candidate
        if name != "auto":
            raise UserError(f"attention {name!r} does not work on {device} in {dtype} ({failure}); use auto")
        logger.warning("attention %s does not work on %s in %s: %s", candidate, device, dtype, failure)
    return "masked"


def probe(
    name: str, device: torch.device, dtype: torch.dtype, head_dim: int, grouped: bool, documents: bool = False
) -> str | None:
    """Why a backend cannot be used, or None; compares output and gradients with the fp32 reference for two windows.

    See `choose_backend` for the arguments; ``documents`` is whether it must keep documents apart.
    """
    generator = torch.Generator().manual_seed(0)
    heads = (4, 2 if grouped else 4)
    shapes = [(2, 160, heads[0], head_dim), *[(2, 160, heads[1], head_dim)] * 2, (2, 160, heads[0], head_dim)]
    q, k, v, grad = (torch.randn(shape, generator=generator, device="cpu").to(device, dtype) for shape in shapes)
    starts = torch.tensor([0, 7, 160, 300, 320], dtype=torch.int32, device=device) if documents else None
    tolerance = 0.03 if dtype.itemsize < 4 else 1e-4
    for window in (5, 160):
        expected = _output_and_gradients(attend_masked, q.float(), k.float(), v.float(), grad.float(), window, starts)
        try:
            actual = _output_and_gradients(BACKENDS[name], q, k, v, grad, window, starts)
        except Exception as error:  # Any failure means: try the next backend.
            return f"{type(error).__name__}: {str(error)[:100]}"
        for what, a, b in zip(("output", "q gradient", "k gradient", "v gradient"), actual, expected, strict=True):
            off = float((a.float() - b).abs().max() / b.abs().max())
            if not off <= tolerance:
                return f"its {what} with a window of {window} is off by {off:.2g} of the largest value"
    return None


def _output_and_gradients(
    attend: Attend, q: Tensor, k: Tensor, v: Tensor, grad: Tensor, window: int, starts: Tensor | None
) -> tuple[Tensor, ...]:
    with torch.enable_grad(), exclude_cudnn():
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        out = attend(inputs[0], inputs[1], inputs[2], window, starts)
        return (out.detach(), *torch.autograd.grad(out, inputs, grad))
