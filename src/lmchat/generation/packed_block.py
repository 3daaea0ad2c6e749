"""A block of the network with packed weights, for generation on a CPU."""

from __future__ import annotations

import math
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmchat.generation.packed_product import pack, packed_product
from lmchat.model.attention import AttentionCache
from lmchat.model.gpt import EPS, Block, ResidualMix, norm


class PackedBlock(nn.Module):
    """`lmchat.model.gpt.Block` with packed weights and fewer operators, whose cost is that of a step of few rows.

    Queries, keys, values and the gate of the value embedding are one product; factors of the residual mix are numbers
    on the host; the squared ReLU, the rotation and sums work in place.

    Args:
        block: the block to take the weights from; it is not modified.
        factors: factors of the residual stream and of the normed embedding, scalars; None without a mix.
        dtype: compute dtype.
    """

    def __init__(self, block: Block, factors: tuple[Tensor, Tensor] | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer, self.window, self.head_dim = block.attn.layer, block.attn.window, block.attn.head_dim
        self.dtype = dtype
        self.pack(block, factors)

    def pack(self, block: Block, factors: tuple[Tensor, Tensor] | None) -> None:
        """Takes new weights."""
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
            x = (x * self.factors[0]).add_(mix[0], alpha=self.factors[1])
        heads, v, *gate = packed_product(_norm(x), self._projection).split_with_sizes(self.sizes, dim=-1)
        q, k = _norm(_rotate(heads.unflatten(-1, (-1, self.head_dim)), cos, sin)).split_with_sizes(self.heads, dim=2)
        v = v.unflatten(-1, (-1, self.head_dim))
        if value_embedding is not None:
            v = torch.addcmul(v, gate[0].sigmoid().unsqueeze(-1), value_embedding.view_as(v), value=2)
        attended = kv_cache.attend(self.layer, q, k, v, self.window).flatten(2)
        x = x + packed_product(attended, self._attention_out)
        inner = packed_product(_norm(x), self._mlp_in, "relu").square_()
        return x.add_(packed_product(inner, self._mlp_out))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See `lmchat.model.gpt.rotate`."""
    halves = x.unflatten(-1, (2, -1))
    rotated = halves * cos.unsqueeze(-2)
    (first, second), (new_first, new_second) = halves.unbind(-2), rotated.unbind(-2)
    new_first.addcmul_(second, sin)
    new_second.addcmul_(first, sin, value=-1)
    return rotated.flatten(-2)


def _norm(x: Tensor) -> Tensor:
    """See `lmchat.model.gpt.norm`; x / sqrt(mean(x²) + eps) in four operators, where `rms_norm` has six on a CPU."""
    if x.dtype != torch.float32:
        return norm(x)
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return (x / torch.hypot(length, _smallest_length(x.size(-1)))).mul_(math.sqrt(x.size(-1)))


@cache
def _smallest_length(width: int) -> Tensor:
    return torch.tensor(math.sqrt(width * EPS))
