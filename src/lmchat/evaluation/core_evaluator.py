"""CORE as an `Evaluator`: in training, in ``lmchat validate`` and in ``lmchat eval``."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torchmetrics import Metric

from lmchat.evaluation.core import CoreTask, Example, PromptTokenizer, centered, examples
from lmchat.evaluation.core_scoring import OptionScore, batches_by_length, is_correct, max_batch_tokens, score
from lmchat.evaluation.evaluator import Evaluator, Metrics
from lmchat.evaluation.intervals import wilson_interval
from lmchat.evaluation.results import Result
from lmchat.hardware import is_out_of_memory
from lmchat.progress import ProgressBar
from lmchat.types import UserError

logger = logging.getLogger(__name__)

CHUNK_EXAMPLES = 512
"""Number of examples that are tokenized together and sorted by length."""


@runtime_checkable
class CoreModel(Protocol):
    """A model that scores examples itself, unlike `lmchat.generation.policy.Policy`."""

    def score(self, questions: Sequence[Example]) -> list[list[OptionScore]]:
        """Scores of each example's options."""


class CoreBatch:
    """Examples of one task that are scored together.

    Not a list or a dataclass: Lightning would look for tensors in every example.
    """

    def __init__(self, task: int, examples: list[Example]) -> None:
        self.task = task
        self.examples = examples


class Counts(Metric):
    """Counters of each task, (tasks, 4) int64, summed over batches and ranks: questions, correct, cut, failures."""

    full_state_update = False

    counts: Tensor

    def __init__(self, num_tasks: int) -> None:
        super().__init__()
        self.add_state("counts", torch.zeros(num_tasks, 4, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, task: int, questions: int, correct: int, cut: int, failures: int = 0) -> None:
        """Adds to the counters of task number ``task``."""
        self.counts[task] += torch.tensor([questions, correct, cut, failures], device=self.counts.device)

    def compute(self) -> Tensor:
        """The counters."""
        return self.counts


class CoreEvaluator(Evaluator):
    """Centered accuracy of each task as ``core/TASK``, and their mean as ``core`` if no task failed.

    An exception in a task fails that task only; out of memory is handled as for every evaluator.

    Args:
        tasks: the tasks, see `lmchat.evaluation.core.read_bundle`.
        tokenizer: the tokenizer of the model.
        max_per_task: maximum number of examples of a task.
        max_tokens: maximum length of a prompt; longer ones are cut at the beginning.
        every_n_steps: see `Evaluator`; 0 is at the end of training only.
        device: device of the model.

    Attributes:
        results: result of each task after `compute`, in the format of the results file.
    """

    name = "core"
    at_start = False

    def __init__(
        self,
        tasks: Sequence[CoreTask],
        tokenizer: PromptTokenizer,
        *,
        max_tokens: int,
        max_per_task: int | None = None,
        every_n_steps: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.tasks = list(tasks)
        self.tokenizer = tokenizer
        self.max_per_task = max_per_task
        self.max_tokens = max_tokens
        self.every_n_steps = every_n_steps
        self.results: dict[str, Result] = {}
        self._counts = Counts(len(self.tasks)).to(device)
        self._errors: dict[int, str] = {}
        self._seconds = [0.0] * len(self.tasks)

    def batches(self, rank: int, world_size: int) -> Iterator[CoreBatch]:
        total = len(self.tasks)
        with ProgressBar("CORE", total, unit="tasks", enabled=rank == 0) as progress:
            for number, task in enumerate(self.tasks):
                progress.set(number, description=f"CORE {task.name}")
                started = time.perf_counter()
                try:
                    yield from self._task_batches(number, rank, world_size)
                except Exception as error:  # e.g. a damaged file: fails this task only
                    self._fail(number, error)
                self._seconds[number] = time.perf_counter() - started
        yield CoreBatch(0, [])  # every rank has a batch

    def _task_batches(self, number: int, rank: int, world_size: int) -> Iterator[CoreBatch]:
        found = examples(
            self.tasks[number],
            self.tokenizer,
            max_items=self.max_per_task,
            max_tokens=self.max_tokens,
            rank=rank,
            world_size=world_size,
        )
        while chunk := list(islice(found, CHUNK_EXAMPLES)):
            for batch in batches_by_length(chunk, max_batch_tokens(self._counts.device)):
                if number in self._errors or self.failure is not None:
                    return
                yield CoreBatch(number, [chunk[index] for index in batch])

    def update(self, policy: Any, batch: CoreBatch) -> None:
        if not batch.examples or batch.task in self._errors:
            return
        kind = self.tasks[batch.task].kind
        try:
            scores = (
                policy.score(batch.examples) if isinstance(policy, CoreModel) else score(policy.net, batch.examples)
            )
            correct = sum(is_correct(kind, *pair) for pair in zip(batch.examples, scores, strict=True))
        except Exception as error:
            if is_out_of_memory(error):
                raise
            self._fail(batch.task, error)
            return
        cut = sum(example.cut for example in batch.examples)
        self._counts.update(batch.task, len(batch.examples), correct, cut)

    def split(self, batch: CoreBatch, parts: int) -> list[CoreBatch]:
        return [CoreBatch(batch.task, examples) for examples in super().split(batch.examples, parts)]

    def _fail(self, number: int, error: Exception) -> None:
        known = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        logger.warning("CORE task %s failed: %s", self.tasks[number].name, known)
        self._errors[number] = known

    def compute(self) -> Metrics:
        for number in range(len(self.tasks)) if self.failure is not None else ():
            self._errors.setdefault(number, str(self.failure))
        for number in self._errors:
            self._counts.update(number, 0, 0, 0, failures=1)
        counts = self._counts.compute().tolist()
        self.results = {
            task.name: self._result(number, *counts[number]) | {"seconds": round(self._seconds[number], 1)}
            for number, task in enumerate(self.tasks)
        }
        self._counts.reset()
        self._errors.clear()
        metrics = {
            f"core/{name}": float(result["centered"]) for name, result in self.results.items() if "centered" in result
        }
        if len(metrics) == len(self.tasks):
            metrics = {"core": sum(metrics.values()) / len(metrics), **metrics}
        return metrics

    def _result(self, number: int, questions: int, correct: int, cut: int, failures: int) -> Result:
        if failures:
            return {"error": self._errors.get(number, "failed on another rank, whose output has the reason")}
        if not questions:
            return {"error": f"{self.tasks[number].path} has no items; unpack the evaluation bundle again"}
        accuracy = correct / questions
        return {
            "accuracy": accuracy,
            "centered": centered(accuracy, self.tasks[number].baseline),
            "questions": questions,
            "cut": cut,
            "interval_95": list(wilson_interval(correct, questions)),
        }

    def settings(self, number: int) -> Result:
        """Settings that the result of task number ``number`` depends on, apart from the model."""
        return {
            "limit": self.max_per_task,
            "max_tokens": self.max_tokens,
            "data": self.tasks[number].fingerprint,
        }
