"""Evaluations by name, run on a checkpoint outside training; results are kept task by task."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from lmchat.evaluation.chat_tasks import ChatTaskEvaluator
from lmchat.evaluation.core import CoreTask, centered
from lmchat.evaluation.core_evaluator import CoreEvaluator
from lmchat.evaluation.evaluator import evaluate
from lmchat.evaluation.intervals import wilson_interval
from lmchat.evaluation.results import Result, read_results, write_results
from lmchat.generation.policy import Policy
from lmchat.tasks import ARC, GSM8K, MMLU, SimpleSpelling, SpellingBee, Task
from lmchat.types import UserError

TASKS: dict[str, Callable[..., Task]] = {
    "ARC-Easy": lambda **options: ARC("ARC-Easy", "test", **options),
    "ARC-Challenge": lambda **options: ARC("ARC-Challenge", "test", **options),
    "MMLU": lambda **options: MMLU("test", skip_malformed=True, **options),
    "GSM8K": lambda **options: GSM8K("test", **options),
    "SpellingBee": lambda path=None, **options: SpellingBee("test", 256, path, **options),
    "SimpleSpelling": lambda path=None, **options: SimpleSpelling("test", 256, path, **options),
}
"""Task by name; ``path`` is a local copy of its data, or for the spelling tasks a word list."""
CHANCE = {"ARC-Easy": 0.25, "ARC-Challenge": 0.25, "MMLU": 0.25}
"""Accuracy of random answers; 0 for tasks that are not listed."""


def make_task(name: str, limit: int | None = None) -> Task:
    """The task that ``NAME`` or ``NAME=PATH`` stands for, at most ``limit`` questions of it.

    Raises:
        UserError: there is no such task.
    """
    name, _, path = name.partition("=")
    if name not in TASKS:
        raise UserError(f"there is no task {name!r}; choose from {', '.join(TASKS)}")
    return TASKS[name](path=path or None, stop=limit)


def evaluate_tasks(
    policy: Policy,
    tasks: Mapping[str, Task],
    results_file: Path,
    *,
    batch_size: int = 32,
    max_new_tokens: int = 256,
) -> Iterator[tuple[str, Result]]:
    """Evaluates each task and writes the results so far to ``results_file``; yields name and result of each.

    A task whose result is already in the file, with as many questions and tokens, is not evaluated again. A task that
    fails has its message as ``error`` and is tried again by the next call.
    """

    def accuracy(task: Task) -> Result:
        evaluator = ChatTaskEvaluator(task, batch_size, max_new_tokens)
        share = float(evaluate(evaluator, policy)[evaluator.name])
        return {"accuracy": share, "questions": len(task)}

    yield from _evaluate_each(
        {
            name: ({"limit": task.slice.stop, "max_new_tokens": max_new_tokens}, partial(accuracy, task))
            for name, task in tasks.items()
        },
        results_file,
    )


def evaluate_core(
    policy: Policy,
    tasks: Sequence[CoreTask],
    results_file: Path,
    *,
    max_per_task: int | None = None,
    max_tokens: int | None = None,
) -> Iterator[tuple[str, Result]]:
    """Evaluates CORE tasks as `evaluate_tasks` does chat tasks. Results also have the ``centered`` accuracy, and how
    many examples were ``cut``: their answers did not fit into the context as a whole."""

    limit = len(policy.net.cos)
    limit = min(max_tokens or limit, limit)

    def result(evaluator: CoreEvaluator) -> Result:
        evaluate(evaluator, policy)
        return evaluator.results[evaluator.tasks[0].name]

    evaluations = {}
    for task in tasks:
        evaluator = CoreEvaluator(
            [task], policy.tokenizer, max_tokens=limit, max_per_task=max_per_task, device=policy.net.device
        )
        evaluations[task.name] = (evaluator.settings(0), partial(result, evaluator))
    yield from _evaluate_each(evaluations, results_file)


def _evaluate_each(
    evaluations: Mapping[str, tuple[Result, Callable[[], Result]]], results_file: Path
) -> Iterator[tuple[str, Result]]:
    """Runs evaluations that are not in the file yet with the same settings; yields the name and result of each."""
    results = read_results(results_file)
    for name, (settings, run) in evaluations.items():
        known = results.get(name, {})
        if "accuracy" not in known or any(known.get(key) != value for key, value in settings.items()):
            results[name] = settings | _timed(run)
            write_results(results_file, results)
        yield name, results[name]


def _timed(run: Callable[[], Result]) -> Result:
    """The result of an evaluation with its interval and duration; its message where it fails."""
    started = time.perf_counter()
    try:
        result = run()
    except Exception as error:  # one task that fails must not lose the others
        return {"error": str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"}
    if "error" in result:
        return result
    interval = wilson_interval(result["accuracy"] * result["questions"], result["questions"])
    return {**result, "interval_95": list(interval), "seconds": round(time.perf_counter() - started, 1)}


def centered_mean(results: Mapping[str, Result], names: Sequence[str]) -> float | None:
    """Mean of the accuracies, each rescaled so that chance is 0 and all correct is 1; None if a task has no result."""
    if not names or any("accuracy" not in results.get(name, {}) for name in names):
        return None
    return sum(
        results[name].get("centered", centered(results[name]["accuracy"], CHANCE.get(name, 0.0))) for name in names
    ) / len(names)
