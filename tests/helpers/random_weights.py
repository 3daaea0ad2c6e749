"""Networks with random weights, so that every part affects the output."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

Net = TypeVar("Net", bound=nn.Module)


def with_random_weights(net: Net, std: float, *, embeddings: float = 0, vectors: float = 0, seed: int = 0) -> Net:
    """Fills the parameters with normal random numbers and returns ``net``.

    Args:
        std: standard deviation.
        embeddings: that of the token embeddings; 0 is ``std``.
        vectors: that of parameters of one dimension; 0 is ``std``.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in net.named_parameters():
            scale = embeddings if "wte" in name else vectors if weight.dim() == 1 else std
            weight.copy_(torch.randn(weight.shape, generator=generator) * (scale or std))
    return net
