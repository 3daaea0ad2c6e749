"""Numbers that the ranks of a run have in common."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch.distributed as dist
from torch import Tensor

from lmchat.strategies.zero2_muon import Zero2MuonStrategy


def reduce_numbers(trainer: L.Trainer, numbers: Tensor, op: Any = dist.ReduceOp.SUM) -> Tensor:
    """A few numbers reduced over the ranks, on the CPU.

    Not by Lightning's ``Strategy.reduce``, which adds a barrier. zero2_muon does it over its group on the CPU: where
    another rank has failed that raises RuntimeError, while NCCL would wait for it where no signal gets through.

    Args:
        numbers: on any device, which is waited for; of the same shape and dtype on all ranks.
        op: a `torch.distributed.ReduceOp`.
    """
    if trainer.world_size == 1:
        return numbers.cpu()
    if isinstance(trainer.strategy, Zero2MuonStrategy):
        return trainer.strategy.reduce_numbers(numbers.cpu(), op)
    numbers = numbers.to(trainer.strategy.root_device)
    dist.all_reduce(numbers, op=op)
    return numbers.cpu()
