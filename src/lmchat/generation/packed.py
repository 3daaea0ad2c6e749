"""Packed weights, for generation on CPUs where a row's result is the same in any batch: linear maps and blocks.

The layout is oneDNN's.
"""

import math
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmchat.generation import cpu_kernels
from lmchat.generation.cached_attention import DecodeCache
from lmchat.model.attention import AttentionCache
from lmchat.model.gpt import AttentionInputs, Block, ResidualMix, norm, rotate

PACKED_ROWS = 128
"""Rows that packed weights are optimized for; the same for all batches, since it affects the order of summation."""


class PackedLinear(nn.Module):
    """A linear map without bias, its weight in oneDNN's packed layout.

    With AVX-512 it is 2 to 6 times as fast as a plain product of 2 to 64 rows, and the result of a row does not depend
    on the number of rows. Inputs have ``dtype``.
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


class PackedBlock(nn.Module):
    """`lmchat.model.gpt.Block` with packed weights and fewer operators, whose cost is that of a step of few rows.

    Queries, keys, values and the gate of the value embedding are one product; factors of the residual mix are numbers
    on the host; in fp32, sums with their norm, and a decode step's attention, are kernels of `cpu_kernels.c`.

    Args:
        block: a block of the same shape; `pack` takes its weights.
        dtype: compute dtype.
    """

    def __init__(self, block: Block, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer, self.window, self.head_dim = block.attn.layer, block.attn.window, block.attn.head_dim
        self.dtype = dtype
        self.fused = cpu_kernels.has_kernels(dtype)

    def pack(self, block: Block, factors: tuple[Tensor, Tensor] | None) -> None:
        """Takes the weights of ``block``, and the factors of the residual stream and the normed embedding if there is
        a mix."""
        attention = block.attn
        q, k, v = attention.c_q.weight, attention.c_k.weight, attention.c_v.weight
        weights = [q, k, v]
        if hasattr(attention, "ve_gate"):
            gate = attention.ve_gate.weight
            weights.append(F.pad(gate, (0, q.size(1) - gate.size(1))))  # it reads the first channels only
        self.heads = [len(q) // self.head_dim, len(k) // self.head_dim]
        self.sizes = [len(q) + len(k), *map(len, weights[2:])]
        self.factors = None if factors is None else (factors[0].item(), factors[1].item())
        self._projection = pack(torch.cat(weights), self.dtype)
        self._attention_out = pack(attention.c_proj.weight, self.dtype)
        self._mlp_in = pack(block.mlp.c_fc.weight, self.dtype)
        self._mlp_out = pack(block.mlp.c_proj.weight, self.dtype)

    def forward(
        self, x: Tensor, value_embedding: Tensor | None, inputs: AttentionInputs, mix: ResidualMix | None = None
    ) -> Tensor:
        """See `Block.forward`; of ``mix`` only the normed embedding is read."""
        if mix is not None and self.factors is not None:
            x, normed = self._add_and_norm(x, mix[0], *self.factors)
        else:
            normed = norm(x)
        projected = packed_product(normed, self._projection)
        cos, sin, kv_cache, *_ = inputs
        assert kv_cache is not None
        if self.fused and isinstance(kv_cache, DecodeCache):
            attended = cpu_kernels.attend(kv_cache, self.layer, self.window, projected, value_embedding, (cos, sin))
        else:
            attended = self._attend(projected, value_embedding, cos, sin, kv_cache)
        x, normed = self._add_and_norm(x, packed_product(attended, self._attention_out))
        inner = packed_product(normed, self._mlp_in, "relu").square_()
        return x.add_(packed_product(inner, self._mlp_out))

    def _add_and_norm(
        self, x: Tensor, added: Tensor, factor: float = 1.0, added_factor: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        if self.fused:
            return cpu_kernels.add_and_norm(x, added, factor, added_factor)
        total = (x * factor).add_(added, alpha=added_factor)
        return total, norm(total)

    def _attend(
        self, projected: Tensor, value_embedding: Tensor | None, cos: Tensor, sin: Tensor, kv_cache: AttentionCache
    ) -> Tensor:
        heads, v, *gate = projected.split_with_sizes(self.sizes, dim=-1)
        heads = norm(rotate(heads.unflatten(-1, (-1, self.head_dim)), cos, sin))
        q, k = heads.split_with_sizes(self.heads, dim=2)
        v = v.unflatten(-1, (-1, self.head_dim))
        if value_embedding is not None:
            v = torch.addcmul(v, gate[0].sigmoid().unsqueeze(-1), value_embedding.view_as(v), value=2)
        return kv_cache.attend(self.layer, q, k, v, self.window).flatten(2)


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
