"""The interface of every evaluation, in training and outside it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.utils.data import IterableDataset
from torchmetrics import Metric

from lmchat.generation.policy import Policy

Metrics = Mapping[str, Tensor | float]
"""Metrics by name, each a scalar."""


class Evaluator(ABC):
    """One evaluation: the batches it reads, how a batch is scored, and the metrics at the end.

    An instance is used again for every evaluation of a run.

    Attributes:
        name: name in logs and tables.
        every_n_steps: optimizer steps between two evaluations in training; None follows ``--eval.every_n_steps``. All
            evaluators also run at the start and at the end of training.
    """

    name: str
    every_n_steps: int | None = None

    @abstractmethod
    def batches(self, rank: int, world_size: int) -> Iterable[Any]:
        """The batches of one evaluation that belong to rank ``rank`` of ``world_size``; at least one on every rank."""

    @abstractmethod
    def update(self, policy: Policy, batch: Any) -> None:
        """Scores a batch, whose tensors are on the device of ``policy.net``."""

    @abstractmethod
    def compute(self) -> Metrics:
        """The metrics over all batches of all ranks since the last call. Every rank must call it."""


class EvalBatch:
    """A batch and the evaluator that it belongs to.

    Not a dataclass: Lightning would copy its fields to the device one by one.
    """

    def __init__(self, evaluator: Evaluator, data: Any) -> None:
        self.evaluator = evaluator
        self.data = data


class EvaluatorBatches(IterableDataset[EvalBatch]):
    """The batches of one evaluator on one rank, as a dataset for Lightning's validation loop.

    Args:
        evaluator: evaluator to read.
        rank: rank of this process.
        world_size: number of ranks.
        is_due: asked at the start of each iteration; where it is false there are no batches.
    """

    def __init__(self, evaluator: Evaluator, rank: int, world_size: int, is_due: Callable[[Evaluator], bool]) -> None:
        self.evaluator = evaluator
        self.rank = rank
        self.world_size = world_size
        self.is_due = is_due

    def __iter__(self) -> Iterator[EvalBatch]:
        if self.is_due(self.evaluator):
            for data in self.evaluator.batches(self.rank, self.world_size):
                yield EvalBatch(self.evaluator, data)


def is_due(evaluator: Evaluator, step: int, last_step: int, default_every_n_steps: int) -> bool:
    """Whether an evaluator runs at an optimizer step of a training run.

    Args:
        evaluator: the evaluator.
        step: optimizer steps taken.
        last_step: optimizer steps of the run.
        default_every_n_steps: cadence of evaluators without their own; 0 is at the start and the end only.
    """
    every = default_every_n_steps if evaluator.every_n_steps is None else evaluator.every_n_steps
    return step in (0, last_step) or (every > 0 and step % every == 0)


def evaluate(evaluator: Evaluator, policy: Policy) -> Metrics:
    """Runs one evaluation in this process alone and returns its metrics."""
    for batch in evaluator.batches(rank=0, world_size=1):
        evaluator.update(policy, batch)
    return evaluator.compute()


def compute_and_reset(metrics: Mapping[str, Metric]) -> Metrics:
    """The values of torchmetrics metrics over all ranks; the metrics start anew."""
    values = {name: metric.compute() for name, metric in metrics.items()}
    for metric in metrics.values():
        metric.reset()
    return values
