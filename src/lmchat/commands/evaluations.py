"""Functions of ``lmchat eval``: load the model, choose the tasks, evaluate, print and save the results."""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table

from lmchat.checkpoint.load import find_model, load_inference_model, load_tokenizer
from lmchat.evaluation.benchmark import Benchmark, evaluate_each, summary
from lmchat.evaluation.chat_core import CHAT_CORE, ChatCoreEvaluator
from lmchat.evaluation.core import choose, read_bundle
from lmchat.evaluation.core_evaluator import CoreEvaluator
from lmchat.evaluation.evaluator import ranks
from lmchat.evaluation.hf_model import HFModel
from lmchat.evaluation.results import Result, read_results, results_file
from lmchat.files import write_json
from lmchat.generation.policy import Policy
from lmchat.paths import eval_bundle_dir, expand_user
from lmchat.tasks import Task
from lmchat.types import UserError


@dataclass(frozen=True)
class Subject:
    """A model to evaluate, and where its results go.

    Attributes:
        model: the model.
        path: file of the results.
        identity: distinguishes its results from those of other weights.
    """

    model: Any
    path: Path
    identity: Result


@contextlib.contextmanager
def joined_processes() -> Iterator[None]:
    """Joins torchrun's process group, if torchrun started this process; only rank 0 prints."""
    if not dist.is_torchelastic_launched():
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group()
    try:
        with contextlib.ExitStack() as stack:
            if dist.get_rank() > 0:
                stack.enter_context(contextlib.redirect_stdout(stack.enter_context(Path(os.devnull).open("w"))))
            yield
    finally:
        dist.destroy_process_group()


def load_hf_subject(model: str, output: Path | None) -> Subject:
    """Loads the model of ``hf:PATH``.

    Raises:
        UserError: ``model`` has another form, or there is no such model.
    """
    kind, _, folder = model.partition(":")
    if kind != "hf" or not folder:
        raise UserError(f"--model is {model}; give hf:PATH, where PATH is the folder of a Hugging Face model")
    path = expand_user(folder)
    found = HFModel(path, _device())
    print(f"{type(found.net).__name__}, {path}")
    return Subject(found, output or path / "eval.json", {"weights": found.fingerprint})


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def load_subject(checkpoint: Path | None, tokenizer: Path | None, output: Path | None) -> Subject:
    """Loads the model of a checkpoint, by default the newest."""
    found = find_model(checkpoint)
    print(f"{found.stage} {found.meta['tag']}, step {found.step}")
    return Subject(
        Policy(load_inference_model(found), load_tokenizer(found, tokenizer)),
        output or results_file(found.paths.directory, found.step),
        {"weights": found.meta["files"][found.paths.model.name]["sha256"][:16]},
    )


def run_core(
    bundle: str, names: list[str] | None, load: Callable[[], Subject], max_per_task: int | None, max_tokens: int | None
) -> None:
    """Evaluates on the CORE tasks with these names, by default all, and prints the results."""
    found = read_bundle(eval_bundle_dir() if bundle == "default" else expand_user(bundle))
    tasks = choose(found, names)
    subject = load()
    model, limit = subject.model, min(max_tokens or subject.model.context_limit, subject.model.context_limit)
    evaluators = (
        CoreEvaluator([task], model.tokenizer, max_tokens=limit, max_per_task=max_per_task, device=model.net.device)
        for task in tasks
    )
    _report(evaluators, subject, "CORE" if len(tasks) == len(found) else None)


def run_chat(subject: Subject, tasks: Mapping[str, Task], **options: Any) -> None:
    """Evaluates on chat benchmarks and reports; for ``options`` see `ChatCoreEvaluator`."""
    device = subject.model.net.device
    evaluators = (ChatCoreEvaluator({name: task}, device=device, **options) for name, task in tasks.items())
    _report(evaluators, subject, "ChatCORE" if set(tasks) == set(CHAT_CORE) else None)


def require_harness() -> None:
    """Raises UserError if lm-evaluation-harness is not installed, or if there are several processes."""
    # Before the processes join: one that leaves at once would fail those that still connect to it.
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and dist.is_torchelastic_launched():
        raise UserError("--harness evaluates in one process; run it without torchrun")
    if find_spec("lm_eval") is None:
        raise UserError("--harness needs lm-evaluation-harness; install it: pip install 'lmchat[harness]'")


def run_harness(subject: Subject, tasks: Sequence[str], include_path: Path | None, options: Mapping[str, Any]) -> None:
    """Evaluates tasks of the harness; prints its table and saves the results of each task."""
    from lm_eval.utils import make_table

    from lmchat.evaluation.harness import evaluate_harness

    found = evaluate_harness(subject.model, tasks, include_path=include_path, **options)
    results = {
        f"harness/{name}": {**options, **subject.identity, **metrics} for name, metrics in found["results"].items()
    }
    write_json(subject.path, read_results(subject.path) | results)
    print(make_table(found))
    print(f"Results are in {subject.path}")


def _report(evaluators: Iterable[Benchmark], subject: Subject, mean_name: str | None) -> None:
    """Evaluates, prints each result and then a table; saves the mean as ``mean_name``, if that is given.

    Raises:
        UserError: tasks have failed; the results of the others are saved.
    """
    console, results = Console(markup=False), {}
    for name, result in evaluate_each(evaluators, subject.model, subject.path, subject.identity):
        results[name] = result
        shown = f"{result['accuracy']:.1%}" if "accuracy" in result else f"failed: {result['error']}"
        console.print(f"  {name}: {shown if shown.isprintable() else ascii(shown)}", highlight=False, soft_wrap=True)
    columns = (Column("task", no_wrap=True), "questions", "accuracy", "95 % interval", "centered")
    table = Table(*columns, box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for name, result in results.items():
        if "accuracy" in result:
            low, high = result["interval_95"]
            interval, centered = f"{low:.1%} … {high:.1%}", f"{result['centered']:.3f}"
            accuracy = f"{result['accuracy']:.1%}"
            table.add_row(name, str(result["questions"]), accuracy, interval, centered)
    if (mean := summary(results)) is not None:
        low, high = mean["interval_95"]
        table.add_section()
        table.add_row(mean_name or "mean", "", "", f"{low:.3f} … {high:.3f}", f"{mean['centered']:.3f}")
        if mean_name is not None and ranks()[0] == 0:
            write_json(subject.path, read_results(subject.path) | {mean_name: mean})
    console.print(table)
    console.print(f"Results are in {subject.path}", soft_wrap=True, highlight=False)
    if failed := [name for name, result in results.items() if "error" in result]:
        if ranks()[0] > 0:  # rank 0 has the message
            raise SystemExit(2)
        raise UserError(f"{len(failed)} of {len(results)} tasks failed; the same command repeats {', '.join(failed)}")
