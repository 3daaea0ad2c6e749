"""Bits per byte: the loss per byte of text, which does not depend on the vocabulary."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torchmetrics import Metric

from lmchat.types import IGNORE_INDEX


class BitsPerByte(Metric):
    """Σ nll / (ln 2 · Σ bytes) over the targets that stand for text, summed over batches and ranks.

    Ignored targets and tokens of no bytes (special tokens) count in neither sum.

    token_bytes: (vocab_size,) integers, bytes of each token.
    """

    full_state_update = False
    higher_is_better = False

    token_bytes: Tensor
    nats: Tensor
    num_bytes: Tensor

    def __init__(self, token_bytes: Tensor) -> None:
        super().__init__()
        self.register_buffer("token_bytes", token_bytes, persistent=False)
        self.add_state("nats", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("num_bytes", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, nll: Tensor, targets: Tensor) -> None:
        """Add the losses (...) in nats of targets (...)."""
        num_bytes = self.token_bytes[targets.clamp(min=0)] * (targets != IGNORE_INDEX)
        self.nats += torch.where(num_bytes > 0, nll, 0).sum(dtype=torch.float64)
        self.num_bytes += num_bytes.sum()

    def compute(self) -> Tensor:
        """Bits per byte, a float64 scalar; infinite where no text was counted."""
        return torch.where(self.num_bytes > 0, self.nats / (math.log(2) * self.num_bytes.double()), math.inf)


def bits_per_byte(nll: Tensor, targets: Tensor, token_bytes: Tensor) -> Tensor:
    """Bits per byte of one batch: losses (...) in nats, targets (...), token_bytes (vocab_size,)."""
    metric = BitsPerByte(token_bytes)
    metric.update(nll, targets)
    return metric.compute()
