"""Inference weights: a copy of a network for generation, updated in place after further training."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmchat.model.gpt import GPT, Linear, SelfAttention, norm, rotate

PACKED_ROWS = 128
"""Rows that packed weights are optimized for; the same for all batches, since it affects the order of summation."""


class InferenceWeights:
    """A copy of a network in eval mode, with its own weights.

    Matrices are cast to the compute dtype once instead of at every use. Weights that already have this dtype are shared
    with the source. On CPUs that support it, matrices are in oneDNN's packed layout, and the projections of the
    attention's input are fused.

    Args:
        source: network to copy weights from; it is not modified.

    Attributes:
        net: the network.
    """

    def __init__(self, source: GPT) -> None:
        self.source = source
        with torch.device("meta"):
            self.net = GPT(
                source.config,
                compute_dtype=source.compute_dtype,
                attention=source.attention,
                rotary_dtype=source.rotary_dtype,
            )
        self._projections: list[tuple[PackedProjection, SelfAttention]] = []
        packed = can_pack(source.device, source.compute_dtype)
        if packed:
            for block, own_block in zip(source.blocks, self.net.blocks, strict=True):
                self._fuse_projections(own_block.attn, block.attn)
        own_names = dict(self.net.named_modules())
        for path, module in source.named_modules():
            if path not in own_names:
                continue
            if isinstance(module, Linear) and packed:
                parent = self.net.get_submodule(path.rpartition(".")[0])
                setattr(parent, path.rpartition(".")[2], PackedLinear(module.weight, source.compute_dtype))
                continue
            for name, weight in module.named_parameters(recurse=False):
                dtype = source.compute_dtype if isinstance(module, Linear) else weight.dtype
                own = nn.Parameter(weight.detach().to(dtype), requires_grad=False)
                setattr(self.net.get_submodule(path), name, own)
        self.net.cos, self.net.sin = source.cos, source.sin
        self.net.eval()

    def _fuse_projections(self, own: SelfAttention, attention: SelfAttention) -> None:
        projection = PackedProjection(attention, self.source.compute_dtype)
        own.project = projection.project  # type: ignore[method-assign]
        for name in ("c_q", "c_k", "c_v", "ve_gate"):
            if hasattr(own, name):
                delattr(own, name)
        self._projections.append((projection, attention))

    @torch.no_grad()
    def refill(self) -> None:
        """Copies the source's weights in place, so that addresses stay valid."""
        for projection, attention in self._projections:
            projection.pack(attention)
        own_modules = dict(self.net.named_modules())
        for path, module in self.source.named_modules():
            own = own_modules.get(path)
            if isinstance(own, PackedLinear):
                own.pack(module.get_parameter("weight"))
            elif own is not None:
                for name, weight in module.named_parameters(recurse=False):
                    mine = own.get_parameter(name)
                    if mine.dtype != weight.dtype:
                        mine.copy_(weight)
                    elif mine.data_ptr() != weight.data_ptr():
                        mine.data = weight.detach()


class PackedLinear(nn.Module):
    """A linear map without bias, its weight in oneDNN's packed layout.

    With AVX-512 it is 2 to 6 times as fast as a plain product of 2 to 64 rows, and the result of a row does not depend
    on the number of rows.

    Args:
        weight: (out, in).
        dtype: dtype of the inputs.
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.pack(weight)

    def pack(self, weight: Tensor) -> None:
        """Takes a new weight."""
        self.weight = weight.detach()
        self._packed = _pack(self.weight, self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in) to (..., out)."""
        return _product(x, self._packed)


class PackedProjection:
    """Queries, keys, values and gate of an attention layer as one packed product."""

    def __init__(self, attention: SelfAttention, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.pack(attention)

    def pack(self, attention: SelfAttention) -> None:
        """Takes new weights."""
        q, k, v = attention.c_q.weight, attention.c_k.weight, attention.c_v.weight
        weights = [q, k, v]
        if hasattr(attention, "ve_gate"):
            gate = attention.ve_gate.weight
            weights.append(F.pad(gate, (0, q.size(1) - gate.size(1))))  # it reads the first channels only
        self.head_dim = attention.head_dim
        self.heads = [len(q) // self.head_dim, len(k) // self.head_dim]
        self.sizes = [len(q) + len(k), *map(len, weights[2:])]
        self._packed = _pack(torch.cat([weight.detach() for weight in weights]), self.dtype)

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """See `SelfAttention.project`."""
        heads, v, *gate = _product(x, self._packed).split(self.sizes, dim=-1)
        q, k = norm(rotate(heads.unflatten(-1, (-1, self.head_dim)), cos, sin)).split(self.heads, dim=2)
        return q, k, v.unflatten(-1, (-1, self.head_dim)), gate[0] if gate else None


def _pack(weight: Tensor, dtype: torch.dtype) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.to(dtype).contiguous(), PACKED_ROWS)
    return packed


def _product(x: Tensor, packed: Tensor) -> Tensor:
    """x: (..., in) to (..., out)."""
    count = x.numel() // x.size(-1)
    missing = padded_rows(count) - count
    rows = F.pad(x.reshape(count, -1), (0, 0, 0, missing)) if missing else x.contiguous()
    out: Tensor = torch.ops.mkldnn._linear_pointwise(rows, packed, None, "none", [], "")
    return out[:count].view(*x.shape[:-1], -1) if missing else out


def padded_rows(rows: int) -> int:
    """Number of rows to compute for ``rows``: multiples of 2 above 32 rows, above 64 one of 8 per power of two.

    For each number of rows and each matrix, torch and oneDNN keep 0.6 MB, for up to 1,024 of them.
    """
    step = 1 << max(0, (rows - 1).bit_length() - (5 if rows <= 64 else 4))
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
            packed = _pack(weight, dtype)
            out = _product(x, packed)
            alone = [_product(x[:rows], packed) for rows in range(1, 4)]
        except (RuntimeError, AttributeError, NotImplementedError):  # Any failure means: plain products.
            return False
        expected = x.double() @ weight.double().T
        # With torch 2.11's AVX2 kernels a row's result depends on how many there are.
        if not all(torch.equal(part, out[: len(part)]) for part in alone):
            return False
        return bool(((out.double() - expected).norm() <= 0.01 * expected.norm()).item())
