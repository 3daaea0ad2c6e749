"""Evaluates a model task by task; results are saved after each task. Several processes evaluate together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from lmchat.evaluation.benchmark import Benchmark
from lmchat.evaluation.chat_core import ChatCoreEvaluator
from lmchat.evaluation.core import CoreTask
from lmchat.evaluation.core_evaluator import CoreEvaluator
from lmchat.evaluation.evaluator import evaluate, ranks
from lmchat.evaluation.hf_model import HFModel
from lmchat.evaluation.results import Result, read_results, write_results
from lmchat.generation.policy import Policy
from lmchat.tasks import Task
from lmchat.types import UserError


def evaluate_tasks(
    policy: Policy,
    tasks: Mapping[str, Task],
    results_file: Path,
    *,
    identity: Result | None = None,
    **options: Any,
) -> Iterator[tuple[str, Result]]:
    """Evaluates tasks one by one, saves each result to ``results_file`` and yields its name and result.

    Tasks with a result for the same settings in the file are not evaluated again. The result of a task that fails is
    its message, as ``error``; the next call tries it again.

    Args:
        policy: the model.
        tasks: tasks by name.
        results_file: JSON file of the results.
        identity: further settings that the results depend on, such as a digest of the weights.
        options: see `ChatCoreEvaluator`.
    """
    evaluators = (ChatCoreEvaluator({name: task}, device=policy.device, **options) for name, task in tasks.items())
    yield from _evaluate_each(evaluators, policy, results_file, identity or {})


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
    evaluators = (
        CoreEvaluator([task], model.tokenizer, max_tokens=limit, max_per_task=max_per_task, device=model.device)
        for task in tasks
    )
    yield from _evaluate_each(evaluators, model, results_file, identity or {})


def _evaluate_each(
    evaluators: Iterator[Benchmark], model: Any, results_file: Path, identity: Result
) -> Iterator[tuple[str, Result]]:
    """Runs the evaluators, of one task each, whose result for the same settings the file does not have; yields name and
    result of all."""
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
            results[name] = settings | _result(evaluator, model)
            if rank == 0:
                write_results(results_file, results)
        yield name, results[name]


def _result(evaluator: Benchmark, model: Any) -> Result:
    try:
        evaluate(evaluator, model)
    except UserError as error:  # out of memory
        return {"error": str(error)}
    return evaluator.results[evaluator.task_names[0]]
