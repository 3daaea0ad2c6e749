"""Reduces a few numbers over the ranks."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch.distributed as dist
from torch import Tensor

from lmchat.strategies.zero2_muon import Zero2MuonStrategy


def reduce_numbers(trainer: L.Trainer, numbers: Tensor, op: Any = dist.ReduceOp.SUM) -> Tensor:
    """Reduces a few numbers over the ranks; returns them on the CPU.

    Lightning's ``Strategy.reduce`` would add a barrier. zero2_muon reduces over its CPU group, which raises
    RuntimeError if another rank has failed; NCCL would wait for that rank and ignore signals.

    Args:
        trainer: the trainer.
        numbers: tensor on any device, with the same shape and dtype on all ranks; needs a device sync.
        op: a `torch.distributed.ReduceOp`.
    """
    if trainer.world_size == 1:
        return numbers.cpu()
    if isinstance(trainer.strategy, Zero2MuonStrategy):
        return trainer.strategy.reduce_numbers(numbers.cpu(), op)
    numbers = numbers.to(trainer.strategy.root_device)
    dist.all_reduce(numbers, op=op)
    return numbers.cpu()
