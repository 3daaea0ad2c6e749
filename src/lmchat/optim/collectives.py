"""Collectives of the sharded optimizer, over NCCL or gloo, and the bytes they send."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 renamed both and warns about the old names.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class BytesSent(NamedTuple):
    """Bytes that one rank sends in one optimizer step, by collective."""

    reduce_scatter: float
    all_gather: float
    all_reduce: float


class Collectives:
    """Asynchronous collectives of tensors on one device; each returns a function that waits for the result.

    Args:
        process_group: process group; None is the default group.
        device: device of the tensors.

    Attributes:
        by_exchange: reduce by all-to-all and a local sum; true on CPUs, where gloo implements reduce-scatter as an
            all-reduce that sends twice the bytes.
    """

    def __init__(self, process_group: dist.ProcessGroup | None, device: torch.device) -> None:
        self.process_group = process_group
        self.device = device
        self.rank = dist.get_rank(process_group)
        self.world_size = dist.get_world_size(process_group)
        self.by_exchange = device.type == "cpu"

    def reduce_scatter_mean(self, send: Tensor) -> Callable[[], Tensor]:
        """Reduces ``send`` (world_size, ...); the result is this rank's part (...) of the mean over ranks."""
        if self.by_exchange:
            received = torch.empty_like(send)
            work = dist.all_to_all_single(received, send, group=self.process_group, async_op=True)
        else:
            received = torch.empty_like(send[0])
            work = reduce_scatter(received, send.flatten(0, 1), group=self.process_group, async_op=True)

        def finish() -> Tensor:
            work.wait()
            return (received.sum(0) if self.by_exchange else received).div_(self.world_size)

        return finish

    def all_reduce_mean(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Averages ``tensor`` over the ranks, in place."""
        work = dist.all_reduce(tensor, group=self.process_group, async_op=True)

        def finish() -> Tensor:
            work.wait()
            return tensor.div_(self.world_size)

        return finish

    def all_gather(self, part: Tensor) -> Callable[[], Tensor]:
        """Gathers ``part`` (...) of every rank; the result is (world_size, ...)."""
        received = part.new_empty(self.world_size, *part.shape)
        work = all_gather(received.flatten(0, 1), part, group=self.process_group, async_op=True)

        def finish() -> Tensor:
            work.wait()
            return received

        return finish

    def broadcast_from_rank0(self, numbers: Sequence[int]) -> list[int]:
        """The ``numbers`` of rank 0, on every rank."""
        tensor = torch.tensor(numbers, device=self.device)
        dist.broadcast(tensor, group=self.process_group, group_src=0)
        return tensor.tolist()
