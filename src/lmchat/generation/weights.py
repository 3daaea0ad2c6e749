"""Inference weights: a copy of a network for generation, updated in place after further training."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lmchat.generation.packed_block import PackedBlock
from lmchat.generation.packed_product import PackedLinear, can_pack
from lmchat.model.gpt import GPT, Block, Linear


class InferenceWeights:
    """A copy of a network in eval mode, with its own weights.

    Matrices are cast to the compute dtype once instead of at every use. Weights that already have this dtype are shared
    with the source. On CPUs that support it, matrices are in oneDNN's packed layout, and blocks are `PackedBlock`.

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
        if can_pack(source.device, source.compute_dtype):
            self._pack()
        own_modules = dict(self.net.named_modules())
        for path, module in source.named_modules():
            own = own_modules.get(path)
            if own is None or isinstance(own, PackedLinear):
                continue
            for name, weight in module.named_parameters(recurse=False):
                dtype = source.compute_dtype if isinstance(module, Linear) else weight.dtype
                setattr(own, name, nn.Parameter(weight.detach().to(dtype), requires_grad=False))
        self.net.cos, self.net.sin = source.cos, source.sin
        self.net.eval()

    def _pack(self) -> None:
        """Replaces the blocks and the head by packed ones."""
        dtype = self.source.compute_dtype
        for layer, block in enumerate(self.source.blocks):
            self.net.transformer.h[layer] = PackedBlock(block, self._factors(layer), dtype)
        self.net.mix_in_blocks = True
        self.net.lm_head = PackedLinear(self.source.lm_head.weight, dtype)  # type: ignore[assignment]

    def _factors(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """Factors of a layer's residual mix, if it has one."""
        source = self.source
        return (source.resid_lambdas[layer], source.x0_lambdas[layer]) if source.config.residual_mix else None

    @torch.no_grad()
    def refill(self) -> None:
        """Copies the source's weights in place, so that addresses stay valid."""
        own_modules = dict(self.net.named_modules())
        for path, module in self.source.named_modules():
            own = own_modules.get(path)
            if isinstance(own, PackedLinear):
                own.pack(module.get_parameter("weight"))
            elif isinstance(own, PackedBlock):
                assert isinstance(module, Block)
                own.pack(module, self._factors(own.layer))
            elif own is not None:
                for name, weight in module.named_parameters(recurse=False):
                    mine = own.get_parameter(name)
                    if mine.dtype != weight.dtype:
                        mine.copy_(weight)
                    elif mine.data_ptr() != weight.data_ptr():
                        mine.data = weight.detach()
