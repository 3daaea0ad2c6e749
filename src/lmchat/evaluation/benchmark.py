"""Several tasks that are evaluated together, and the mean of their centered accuracies: CORE and ChatCORE."""

import logging
import time
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lmchat.evaluation.evaluator import Counts, Evaluator, Metrics, evaluate, ranks
from lmchat.evaluation.intervals import bootstrap_interval, wilson_interval
from lmchat.evaluation.results import Result, read_results
from lmchat.files import write_json
from lmchat.hardware import is_out_of_memory
from lmchat.progress import ProgressBar
from lmchat.types import UserError

logger = logging.getLogger(__name__)


class TaskBatch:
    """Examples of one task that are scored together.

    Not a list or a dataclass: Lightning would look for tensors in every example.
    """

    def __init__(self, task: int, examples: list[Any]) -> None:
        self.task = task
        self.examples = examples


class Benchmark(Evaluator):
    """Accuracy of each task as ``NAME/TASK``, and the mean of the centered ones as ``NAME`` if no task failed.

    An exception in a task fails that task only; out of memory is handled as for every evaluator.

    Args:
        baselines: accuracy of random answers by the tasks' names.
        every_n_steps: see `Evaluator`; 0 is at the end of training only.
        device: device of the model.

    Attributes:
        mean_name: name of the mean in files and tables.
        metric: key of a task's result that is logged, ``accuracy`` or ``centered``.
        has_cut: whether results have the number of examples whose answer did not fit into the context, as ``cut``.
        results: result of each task after `compute`, in the format of the results file.
    """

    mean_name: str
    metric = "accuracy"
    has_cut = False
    at_start = False

    def __init__(self, baselines: Mapping[str, float], every_n_steps: int, device: torch.device | str) -> None:
        self.baselines = dict(baselines)
        self.task_names = list(baselines)
        self.every_n_steps = every_n_steps
        self.results: dict[str, Result] = {}
        self._counts = Counts(len(baselines), 4).to(device)  # questions, correct, cut, failures
        self._errors: dict[int, str] = {}
        self._seconds = [0.0] * len(baselines)

    @property
    def device(self) -> torch.device:
        return self._counts.device

    @abstractmethod
    def task_batches(self, number: int, rank: int, world_size: int) -> Iterator[list[Any]]:
        """One rank's examples of task ``number``, in batches."""

    @abstractmethod
    def score_batch(self, policy: Any, number: int, examples: Sequence[Any]) -> tuple[int, int]:
        """Number of correct examples of task ``number``, and of those whose answer was cut."""

    @abstractmethod
    def settings(self, number: int) -> Result:
        """Settings that the result of task ``number`` depends on, apart from the model."""

    def batches(self, rank: int, world_size: int) -> Iterator[TaskBatch]:
        total = len(self.task_names)
        with ProgressBar(self.mean_name, total, unit="tasks", enabled=rank == 0) as progress:
            for number, name in enumerate(self.task_names):
                progress.set(number, f"{self.mean_name} {name}")
                started = time.perf_counter()
                try:
                    for examples in self.task_batches(number, rank, world_size):
                        if number in self._errors or self.failure is not None:
                            break
                        yield TaskBatch(number, examples)
                except Exception as error:  # e.g. a damaged file: fails this task only
                    self._fail(number, error)
                self._seconds[number] = time.perf_counter() - started
        yield TaskBatch(0, [])  # every rank has a batch

    def update(self, policy: Any, batch: TaskBatch) -> None:
        if not batch.examples or batch.task in self._errors:
            return
        try:
            correct, cut = self.score_batch(policy, batch.task, batch.examples)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            self._fail(batch.task, error)
            return
        self._counts.update([len(batch.examples), correct, cut, 0], batch.task)

    def split(self, batch: TaskBatch, parts: int) -> list[TaskBatch]:
        return [TaskBatch(batch.task, examples) for examples in super().split(batch.examples, parts)]

    def _fail(self, number: int, error: Exception) -> None:
        known = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        logger.warning("%s task %s failed: %s", self.mean_name, self.task_names[number], known)
        self._errors[number] = known

    def compute(self) -> Metrics:
        for number in range(len(self.task_names)) if self.failure is not None else ():
            self._errors.setdefault(number, str(self.failure))
        for number in self._errors:
            self._counts.update([0, 0, 0, 1], number)
        counts = self._counts.pop()
        self.results = {
            name: self._result(number, *counts[number]) | {"seconds": round(self._seconds[number], 1)}
            for number, name in enumerate(self.task_names)
        }
        self._errors.clear()
        scored = {name: result for name, result in self.results.items() if "accuracy" in result}
        metrics = {f"{self.name}/{name}": float(result[self.metric]) for name, result in scored.items()}
        intervals = {f"{self.name}/{name}": self._interval(name, result) for name, result in scored.items()}
        if mean := summary(self.results):
            metrics = {self.name: mean["centered"], **metrics}
            intervals[self.name] = tuple(mean["interval_95"])
        self.intervals = intervals
        return metrics

    def _result(self, number: int, questions: int, correct: int, cut: int, failures: int) -> Result:
        if failures:
            return {"error": self._errors.get(number, "failed on another rank, whose output has the reason")}
        name = self.task_names[number]
        if not questions:
            return {"error": f"{name} has no questions; give another file of its data"}
        accuracy = correct / questions
        return {
            "accuracy": accuracy,
            "centered": centered(accuracy, self.baselines[name]),
            "questions": questions,
            **({"cut": cut} if self.has_cut else {}),
            "interval_95": list(wilson_interval(correct, questions)),
        }

    def _interval(self, name: str, result: Result) -> tuple[float, float]:
        low, high = result["interval_95"]
        if self.metric == "accuracy":
            return low, high
        return centered(low, self.baselines[name]), centered(high, self.baselines[name])


def centered(accuracy: float, baseline: float) -> float:
    """``accuracy`` rescaled linearly so that ``baseline`` becomes 0 and 1 stays 1."""
    return (accuracy - baseline) / (1 - baseline)


def summary(results: Mapping[str, Result]) -> Result | None:
    """Mean of the centered accuracies with its 95 % interval; None if there is no task, or one without a result."""
    values = list(results.values())
    if not values or any("centered" not in value for value in values):
        return None
    shares = [(value["accuracy"], value["centered"]) for value in values]
    # From centered = (accuracy − baseline) / (1 − baseline); all correct is 1 for every baseline.
    baselines = [(share - mean) / (1 - mean) if mean < 1 else 0.0 for share, mean in shares]
    questions = [value["questions"] for value in values]
    correct = [round(share * number) for (share, _), number in zip(shares, questions, strict=True)]
    return {
        "centered": sum(mean for _, mean in shares) / len(shares),
        "interval_95": list(bootstrap_interval(correct, questions, baselines)),
        "tasks": list(results),
    }


def evaluate_each(
    evaluators: Iterable[Benchmark], model: Any, results_file: Path, identity: Result
) -> Iterator[tuple[str, Result]]:
    """Evaluates tasks one by one on all ranks, saves each result to ``results_file`` and yields its name and result.

    Tasks with a result for the same settings in the file are not evaluated again. The result of a task that fails is
    its message, as ``error``; the next call tries it again.

    Args:
        evaluators: evaluators of one task each.
        model: what they evaluate: a `Policy`, or for CORE also an `HFModel`.
        results_file: JSON file of the results.
        identity: further settings that the results depend on, such as a digest of the weights.
    """
    rank, world_size = ranks()
    results = read_results(results_file) if rank == 0 else {}
    if world_size > 1:  # the file may change before another rank reads it
        shared = [results]
        dist.broadcast_object_list(shared)
        (results,) = shared
    for evaluator in evaluators:
        (name,) = evaluator.task_names
        settings, known = evaluator.settings(0) | identity, results.get(name, {})
        if "accuracy" not in known or any(known.get(key) != value for key, value in settings.items()):
            try:
                evaluate(evaluator, model)
                results[name] = settings | evaluator.results[name]
            except UserError as error:  # out of memory
                results[name] = settings | {"error": str(error)}
            if rank == 0:
                write_json(results_file, results)
        yield name, results[name]
