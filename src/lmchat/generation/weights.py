"""Inference weights: a copy of a network for generation, updated in place after further training."""

import torch
from torch import nn

from lmchat.generation.packed import PackedBlock, PackedLinear, can_pack
from lmchat.model.gpt import GPT, Block, Linear


class InferenceWeights:
    """A copy of a network in eval mode, with its own weights; the network is not modified.

    Matrices are cast to the compute dtype once instead of at every use. Weights that already have this dtype are shared
    with the source. On CPUs that support it, matrices are in oneDNN's packed layout, and blocks are `PackedBlock`.
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
            for layer, block in enumerate(source.blocks):
                self.net.transformer.h[layer] = PackedBlock(block, source.compute_dtype)
            self.net.lm_head = PackedLinear(source.compute_dtype)  # type: ignore[assignment]
            self.net.mix_in_blocks = True
        self.refill()
        self.net.cos, self.net.sin = source.cos, source.sin
        self.net.eval()

    @torch.inference_mode(False)
    @torch.no_grad()
    def refill(self) -> None:
        """Copies the source's weights, in place where they are cast, so that addresses stay valid."""
        source, own_modules = self.source, dict(self.net.named_modules())
        for path, module in source.named_modules():
            own = own_modules.get(path)
            if isinstance(own, PackedLinear):
                own.pack(module.get_parameter("weight"))
            elif isinstance(own, PackedBlock):
                assert isinstance(module, Block)
                layer, mixes = own.layer, source.config.residual_mix
                own.pack(module, (source.resid_lambdas[layer], source.x0_lambdas[layer]) if mixes else None)
            elif own is not None:
                for name, weight in module.named_parameters(recurse=False):
                    mine = own.get_parameter(name)
                    if mine.is_meta or mine.dtype == weight.dtype:
                        dtype = source.compute_dtype if isinstance(module, Linear) else weight.dtype
                        setattr(own, name, nn.Parameter(weight.detach().to(dtype), requires_grad=False))
                    else:
                        mine.copy_(weight)
