"""Evaluates a checkpoint on tasks given by name; results are saved after each task."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from lmchat.evaluation.chat_tasks import ChatTaskEvaluator
from lmchat.evaluation.core import CoreTask, centered
from lmchat.evaluation.core_evaluator import CoreEvaluator
from lmchat.evaluation.evaluator import evaluate
from lmchat.evaluation.hf_model import HFModel
from lmchat.evaluation.intervals import bootstrap_interval, wilson_interval
from lmchat.evaluation.results import Result, read_results, write_results
from lmchat.evaluation.sandbox import Sandbox
from lmchat.generation.policy import Policy
from lmchat.tasks import ARC, GSM8K, MMLU, HumanEval, SimpleSpelling, SpellingBee, Task
from lmchat.tasks.base import MultipleChoice
from lmchat.types import UserError

TASKS: dict[str, Callable[..., Task]] = {
    "ARC-Easy": lambda **options: ARC("ARC-Easy", "test", **options),
    "ARC-Challenge": lambda **options: ARC("ARC-Challenge", "test", **options),
    "MMLU": lambda **options: MMLU("test", skip_malformed=True, **options),
    "GSM8K": lambda **options: GSM8K("test", **options),
    "HumanEval": lambda **options: HumanEval(**options),
    "SpellingBee": lambda path=None, **options: SpellingBee("test", 256, path, **options),
    "SimpleSpelling": lambda path=None, **options: SimpleSpelling("test", 256, path, **options),
}
"""Tasks by name; ``path`` is a local copy of the data, or for the spelling tasks a word list."""
CHAT_CORE = ("ARC-Easy", "ARC-Challenge", "MMLU", "GSM8K", "HumanEval", "SpellingBee")
"""The tasks of ChatCORE."""
CHANCE = {"ARC-Easy": 0.25, "ARC-Challenge": 0.25, "MMLU": 0.25}
"""Accuracy of random answers; 0 for other tasks."""


def make_task(name: str, limit: int | None = None) -> Task:
    """Creates the task given as ``NAME`` or ``NAME=PATH``, with at most ``limit`` questions.

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
    sandbox: Sandbox | None = None,
    identity: Result | None = None,
) -> Iterator[tuple[str, Result]]:
    """Evaluates tasks one by one, saves each result to ``results_file`` and yields its name and result.

    Tasks with a result for the same settings in the file are not evaluated again. The result of a task that fails is
    its message, as ``error``; the next call tries it again.

    Args:
        policy: the model.
        tasks: tasks by name.
        results_file: JSON file of the results.
        batch_size: questions of multiple choice read together. The other questions of a task are one request each to
            the engine, which decides how many it decodes together.
        max_new_tokens: maximum number of new tokens of an answer.
        sandbox: where programs are run.
        identity: further settings that the results depend on, such as a digest of the weights.
    """

    def accuracy(name: str, task: Task) -> Result:
        size = batch_size if isinstance(task, MultipleChoice) else max(1, len(task))
        evaluator = ChatTaskEvaluator(task, size, max_new_tokens, sandbox)
        share = float(evaluate(evaluator, policy)[evaluator.name])
        return {"accuracy": share, "centered": centered(share, CHANCE.get(name, 0.0)), "questions": len(task)}

    def settings(task: Task) -> Result:
        path = getattr(task, "path", None)
        return {"limit": task.slice.stop, "max_new_tokens": max_new_tokens, "path": path, **(identity or {})}

    evaluations = {name: (settings(task), partial(accuracy, name, task)) for name, task in tasks.items()}
    yield from _evaluate_each(evaluations, results_file)


def evaluate_core(
    model: Policy | HFModel,
    tasks: Sequence[CoreTask],
    results_file: Path,
    *,
    max_per_task: int | None = None,
    max_tokens: int | None = None,
    identity: Result | None = None,
) -> Iterator[tuple[str, Result]]:
    """Evaluates CORE tasks like `evaluate_tasks`. Results also have the number of examples ``cut``, whose answers did
    not fit into the context."""
    limit = min(max_tokens or model.context_limit, model.context_limit)

    def result(evaluator: CoreEvaluator) -> Result:
        evaluate(evaluator, model)
        return evaluator.results[evaluator.tasks[0].name]

    evaluations = {}
    for task in tasks:
        evaluator = CoreEvaluator(
            [task], model.tokenizer, max_tokens=limit, max_per_task=max_per_task, device=model.device
        )
        evaluations[task.name] = (evaluator.settings(0) | (identity or {}), partial(result, evaluator))
    yield from _evaluate_each(evaluations, results_file)


def _evaluate_each(
    evaluations: Mapping[str, tuple[Result, Callable[[], Result]]], results_file: Path
) -> Iterator[tuple[str, Result]]:
    """Runs the evaluations that the file does not have with the same settings; yields name and result of all."""
    results = read_results(results_file)
    for name, (settings, run) in evaluations.items():
        known = results.get(name, {})
        if "accuracy" not in known or any(known.get(key) != value for key, value in settings.items()):
            results[name] = settings | _timed(run)
            write_results(results_file, results)
        yield name, results[name]


def _timed(run: Callable[[], Result]) -> Result:
    """Result of an evaluation with interval and duration; if it fails, its message."""
    started = time.perf_counter()
    try:
        result = run()
    except Exception as error:  # one failing task must not stop the others
        return {"error": str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"}
    if "error" in result:
        return result
    interval = wilson_interval(result["accuracy"] * result["questions"], result["questions"])
    return {**result, "interval_95": list(interval), "seconds": round(time.perf_counter() - started, 1)}


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
