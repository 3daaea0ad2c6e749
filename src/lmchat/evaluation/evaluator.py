"""The interface of evaluations, in training and outside it."""

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import IterableDataset
from torchmetrics import Metric

from lmchat.generation.policy import Policy
from lmchat.hardware import is_out_of_memory
from lmchat.types import UserError

logger = logging.getLogger(__name__)

Metrics = Mapping[str, Tensor | float]
"""Metrics by name, each a scalar."""


class Evaluator(ABC):
    """An evaluation: its batches, how to score a batch, and the resulting metrics.

    The same instance is used for all evaluations of a run.

    Attributes:
        name: name in logs and tables.
        every_n_steps: optimizer steps between two evaluations in training; None follows ``--eval.every_n_steps``. All
            evaluators also run at the end of training.
        at_start: whether it runs before the first step of training.
        parts: number of parts that each batch is split into; doubled when memory runs out.
        failure: why the current evaluation has no result, or None.
        intervals: 95 % intervals of the metrics of the last `compute`, by name, as far as they are known.
    """

    name: str
    every_n_steps: int | None = None
    at_start: bool = True
    parts: int = 1
    failure: str | None = None
    intervals: Mapping[str, tuple[float, float]] = MappingProxyType({})

    @abstractmethod
    def batches(self, rank: int, world_size: int) -> Iterable[Any]:
        """The batches of rank ``rank`` of ``world_size`` in one evaluation; at least one on every rank."""

    @abstractmethod
    def update(self, policy: Policy, batch: Any) -> None:
        """Scores a batch, whose tensors are on the device of ``policy.net``."""

    def split(self, batch: Any, parts: int) -> list[Any]:
        """Splits a batch into at most ``parts`` parts of similar size; supports lists, and dicts of tensors by rows."""
        if isinstance(batch, dict):
            columns = {name: value.chunk(parts) for name, value in batch.items()}
            return [dict(zip(columns, rows, strict=True)) for rows in zip(*columns.values(), strict=True)]
        size = max(1, math.ceil(len(batch) / parts))
        return [batch[start : start + size] for start in range(0, max(1, len(batch)), size)]

    @abstractmethod
    def compute(self) -> Metrics:
        """Returns the metrics over all batches of all ranks since the last call. Every rank must call it."""


class EvalBatch:
    """A batch and its evaluator.

    Not a dataclass or tuple: Lightning would move or copy the evaluator too.
    """

    def __init__(self, evaluator: Evaluator, data: Any) -> None:
        self.evaluator = evaluator
        self.data = data

    def pin_memory(self) -> Self:
        """Pins the tensors of a dict; called by torch's DataLoader, for GPUs."""
        data = self.data
        if isinstance(data, dict):
            data = {name: value.pin_memory() if isinstance(value, Tensor) else value for name, value in data.items()}
        return type(self)(self.evaluator, data)


@dataclass(eq=False)
class EvaluatorBatches(IterableDataset[EvalBatch]):
    """The batches of one evaluator on one rank, as a dataset for Lightning's validation loop.

    ``is_due`` is called at the start of each iteration; if it returns False, the iteration has no batches.
    """

    evaluator: Evaluator
    rank: int
    world_size: int
    is_due: Callable[[Evaluator], bool]

    def __iter__(self) -> Iterator[EvalBatch]:
        if not self.is_due(self.evaluator):
            return
        try:
            for data in self.evaluator.batches(self.rank, self.world_size):
                yield EvalBatch(self.evaluator, data)
        except (RuntimeError, MemoryError, OSError) as error:
            if not is_out_of_memory(error):
                raise
            _give_up(self.evaluator, f"out of memory while reading its data ({error})")


def update_within_memory(evaluator: Evaluator, policy: Policy, batch: Any) -> None:
    """Calls `Evaluator.update`, and splits the batch into smaller parts if memory runs out.

    If the smallest part does not fit either, ``failure`` is set instead of raising, so that training continues. Later
    batches keep the smaller parts.
    """
    pending = evaluator.split(batch, evaluator.parts) if evaluator.parts > 1 else [batch]
    while pending and evaluator.failure is None:
        try:
            evaluator.update(policy, pending[0])  # if it fails, it has changed no metric
            del pending[0]
            continue
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            problem = str(error).partition("\n")[0]
        # The tensors of the failed call are free only here: its exception kept them alive.
        policy.release_memory()
        halves = evaluator.split(pending[0], 2)
        if len(halves) == 1:
            _give_up(evaluator, f"out of memory with the smallest batch ({problem})")
            return
        evaluator.parts *= 2
        logger.warning("%s: out of memory, continuing with 1/%d of its batch", evaluator.name, evaluator.parts)
        pending[:1] = halves


def _give_up(evaluator: Evaluator, reason: str) -> None:
    evaluator.failure = reason
    logger.warning("%s: %s; continuing without it", evaluator.name, reason)


def ranks() -> tuple[int, int]:
    """Rank of this process, and number of processes that evaluate together."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def evaluate(evaluator: Evaluator, policy: Any) -> Metrics:
    """Runs one evaluation outside of training, sharded over the processes, and returns its metrics.

    Raises:
        UserError: memory ran out with the smallest batch.
    """
    for batch in evaluator.batches(*ranks()):
        update_within_memory(evaluator, policy, batch)
    metrics, failure = evaluator.compute(), evaluator.failure
    evaluator.failure = None
    if failure is not None:
        raise UserError(f"{evaluator.name}: {failure}; free memory, or use a smaller model")
    return metrics


class Counts(Metric):
    """Counters of a shape, int64, summed over batches and ranks."""

    full_state_update = False

    counts: Tensor

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.add_state("counts", torch.zeros(shape, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, numbers: Tensor | list[int], index: Any = ...) -> None:
        """Adds ``numbers`` to ``counts[index]``, by default to all."""
        self.counts[index] += torch.as_tensor(numbers, device=self.counts.device)

    def compute(self) -> Tensor:
        return self.counts

    def pop(self) -> Any:
        """The counters of all ranks as nested lists; they start again at 0. Every rank must call it."""
        totals = self.compute().tolist()
        self.reset()
        return totals
