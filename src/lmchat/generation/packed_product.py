"""Matrix products with weights in oneDNN's packed layout, on CPUs where a row's result is the same in any batch."""

from __future__ import annotations

import math
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PACKED_ROWS = 128
"""Rows that packed weights are optimized for; the same for all batches, since it affects the order of summation."""


class PackedLinear(nn.Module):
    """A linear map without bias, its weight in oneDNN's packed layout.

    With AVX-512 it is 2 to 6 times as fast as a plain product of 2 to 64 rows, and the result of a row does not depend
    on the number of rows.

    Args:
        dtype: dtype of the inputs.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def pack(self, weight: Tensor) -> None:
        """Takes a weight (out, in)."""
        self.weight = weight.detach()
        self._packed = pack(self.weight, self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in) to (..., out)."""
        return packed_product(x, self._packed)


def pack(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight (out, in) in the packed layout."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach().to(dtype).contiguous(), PACKED_ROWS)
    return packed


def packed_product(x: Tensor, packed: Tensor, activation: str = "none") -> Tensor:
    """(..., out) for x (..., in) and a packed weight; ``activation`` is "none" or "relu"."""
    *leading, width = x.shape
    count = math.prod(leading)
    missing = padded_rows(count) - count
    rows = F.pad(x.reshape(count, width), (0, 0, 0, missing)) if missing else x.contiguous()
    out: Tensor = torch.ops.mkldnn._linear_pointwise(rows, packed, None, activation, [], "")
    return out[:count].view(*leading, -1) if missing else out


def padded_rows(rows: int) -> int:
    """Number of rows to compute for ``rows``: multiples of 2 above 32 rows, above 64 one of 8 per power of two.

    For each number of rows and each matrix, torch and oneDNN keep 0.6 MB, for up to 1,024 of them.
    """
    if rows <= 32:
        return rows
    step = 1 << ((rows - 1).bit_length() - (5 if rows <= 64 else 4))
    return -(-rows // step) * step


@cache
def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether packed products on the device are correct, and do not depend on the number of rows."""
    if device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16) or not torch.backends.mkldnn.is_available():
        return False
    with torch.inference_mode():
        generator = torch.Generator().manual_seed(0)
        weight, x = (torch.randn(shape, generator=generator, device="cpu") for shape in ((96, 64), (5, 64)))
        weight, x = weight.to(dtype), x.to(dtype)
        try:
            packed = pack(weight, dtype)
            out = packed_product(x, packed)
            alone = [packed_product(x[:rows], packed) for rows in range(1, 4)]
            positive = [packed_product(x[:rows], packed, "relu") for rows in (1, 5)]
        except (RuntimeError, AttributeError, NotImplementedError):  # Any failure means: plain products.
            return False
        expected = x.double() @ weight.double().T
        # With torch 2.11's AVX2 kernels a row's result depends on how many there are.
        if not all(torch.equal(part, out[: len(part)]) for part in alone):
            return False
        if not all(torch.equal(part, out[: len(part)].relu()) for part in positive):
            return False
        return bool(((out.double() - expected).norm() <= 0.01 * expected.norm()).item())
