"""A block of the network with packed weights, for generation on a CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmchat.generation import cpu_kernels
from lmchat.generation.cached_attention import DecodeCache
from lmchat.generation.packed_product import pack, packed_product
from lmchat.model.attention import AttentionCache
from lmchat.model.gpt import Block, ResidualMix, norm, rotate


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
        self,
        x: Tensor,
        value_embedding: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        kv_cache: AttentionCache,
        mix: ResidualMix | None = None,
    ) -> Tensor:
        """See `Block.forward`; of ``mix`` only the normed embedding is read."""
        if mix is not None and self.factors is not None:
            x, normed = self._add_and_norm(x, mix[0], *self.factors)
        else:
            normed = norm(x)
        projected = packed_product(normed, self._projection)
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
