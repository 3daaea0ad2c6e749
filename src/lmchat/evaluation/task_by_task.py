"""Evaluates a model task by task; results are saved after each task. Several processes evaluate together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch.distributed as dist

from lmchat.evaluation.benchmark import Benchmark
from lmchat.evaluation.evaluator import evaluate, ranks
from lmchat.evaluation.hf_model import HFModel
from lmchat.evaluation.results import Result, read_results
from lmchat.files import write_json
from lmchat.generation.policy import Policy
from lmchat.types import UserError


def evaluate_each(
    evaluators: Iterable[Benchmark], model: Policy | HFModel, results_file: Path, identity: Result
) -> Iterator[tuple[str, Result]]:
    """Evaluates tasks one by one, saves each result to ``results_file`` and yields its name and result.

    Tasks with a result for the same settings in the file are not evaluated again. The result of a task that fails is
    its message, as ``error``; the next call tries it again.

    Args:
        evaluators: evaluators of one task each.
        model: the model.
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
