"""Evaluations by name, run on a checkpoint outside training; results are kept task by task."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lmchat.evaluation.chat_tasks import ChatTaskEvaluator
from lmchat.evaluation.evaluator import evaluate
from lmchat.evaluation.intervals import wilson_interval
from lmchat.files import replacing
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

Result = dict[str, Any]


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
    fails with a UserError has its message as ``error`` and is tried again by the next call.
    """
    results = _read(results_file)
    for name, task in tasks.items():
        settings = {"limit": task.slice.stop, "max_new_tokens": max_new_tokens}
        known = results.get(name, {})
        if "accuracy" not in known or any(known.get(key) != value for key, value in settings.items()):
            results[name] = settings | _evaluate_task(policy, task, batch_size, max_new_tokens)
            with replacing(results_file) as unfinished:
                unfinished.write_text(json.dumps(results, indent=2) + "\n")
        yield name, results[name]


def _evaluate_task(policy: Policy, task: Task, batch_size: int, max_new_tokens: int) -> Result:
    started = time.perf_counter()
    try:
        evaluator = ChatTaskEvaluator(task, batch_size, max_new_tokens)
        accuracy = float(evaluate(evaluator, policy)[evaluator.name])
    except UserError as error:
        return {"error": str(error)}
    low, high = wilson_interval(accuracy * len(task), len(task))
    return {
        "accuracy": accuracy,
        "interval_95": [low, high],
        "questions": len(task),
        "seconds": round(time.perf_counter() - started, 1),
    }


def centered_mean(results: Mapping[str, Result], names: Sequence[str]) -> float | None:
    """Mean of the accuracies, each rescaled so that chance is 0 and all correct is 1; None if a task has no result."""
    if not names or any("accuracy" not in results.get(name, {}) for name in names):
        return None
    centered = [(results[name]["accuracy"] - CHANCE.get(name, 0.0)) / (1 - CHANCE.get(name, 0.0)) for name in names]
    return float(sum(centered) / len(centered))


def _read(path: Path) -> dict[str, Result]:
    try:
        results = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a file of results ({error}); move it away") from error
    if not isinstance(results, dict) or not all(isinstance(result, dict) for result in results.values()):
        raise UserError(f"{path} is not a file of results; move it away")
    return results
