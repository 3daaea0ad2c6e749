"""The demo's stages in order: functions that take a `Demo` and return metrics.

The metrics of finished stages are saved in ``summary.json``, so a second run resumes at the first unfinished stage.
"""

import json
import math
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from lmchat.demo.conversation import converse
from lmchat.demo.report import result_tables, write_run_report
from lmchat.demo.run import Demo, Metrics
from lmchat.demo.text import collect_text, measure_baselines, tokenize, train_tokenizer
from lmchat.demo.training import finetune, pretrain, reinforce
from lmchat.files import write_json
from lmchat.types import UserError, user_errors

_ELSEWHERE = "choose another folder with --output (make demo OUTPUT=folder)"

STAGES: dict[str, tuple[str, Callable[[Demo], Metrics]]] = {
    "corpus": ("Find text", collect_text),
    "tokenizer": ("Train a tokenizer", train_tokenizer),
    "tokens": ("Tokenize the text", tokenize),
    "baselines": ("Measure compression baselines", measure_baselines),
    "pretrain": ("Train a GPT", pretrain),
    "sft": ("Fine-tune it to a chat model", finetune),
    "rl": ("Reinforcement learning on word problems", reinforce),
    "report": ("Write the report", write_run_report),
    "conversation": ("Chat with it", converse),
}
"""Stages by name in ``summary.json``: heading and function."""


def run_stages(output: Path, text: Path | None, minutes: float) -> None:
    """Runs the unfinished stages of ``lmchat demo`` and prints the results."""
    if not 0 < minutes < math.inf:
        raise UserError(f"--minutes is {minutes:g}; give a time budget, for example 15")
    console = Console()
    run = Demo(output, text, minutes)
    summary = _open_summary(run)
    for number, (name, (title, stage)) in enumerate(STAGES.items(), start=1):
        heading = f"[bold]\\[{number}/{len(STAGES)}] {title}[/bold]"
        if name in summary["stages"]:
            console.print(f"{heading}: done in an earlier run, {summary['stages'][name]['seconds']:.0f} s")
            continue
        console.print(heading)
        started = time.perf_counter()
        try:
            metrics = stage(run)
        except KeyboardInterrupt:
            console.print("Interrupted. Run the same command again to continue.")
            raise
        summary["stages"][name] = {"seconds": round(time.perf_counter() - started, 1), **metrics}
        summary["minutes"] = round(sum(metrics["seconds"] for metrics in summary["stages"].values()) / 60, 2)
        write_json(run.summary, summary)
    console.print(*result_tables(run, summary))
    took = f"The demo took {summary['minutes']:.1f} minutes."
    console.print(f"{took}\nMetrics: {run.summary}. To chat with the model, here or in a browser:", soft_wrap=True)
    program = Path(sys.executable).with_name("lmchat")
    program = program.relative_to(Path.cwd()) if program.is_relative_to(Path.cwd()) else program
    for command in ("chat", "serve"):
        line = f"LMCHAT_BASE_DIR={shlex.quote(str(run.output))} {shlex.quote(str(program))} {command}"
        console.print(f"  {line}", soft_wrap=True, highlight=False)


def _open_summary(run: Demo) -> dict[str, Any]:
    """The summary of an earlier run with the same recipe, or an empty one."""
    recipe = run.recipe()
    if not run.summary.exists():
        if run.output.exists() and (not run.output.is_dir() or any(run.output.iterdir())):
            raise UserError(f"{run.output} is not the output of a demo; {_ELSEWHERE}")
        summary = {"minutes": 0.0, "recipe": recipe, "stages": {}}
        run.output.mkdir(parents=True, exist_ok=True)
        write_json(run.summary, summary)
        return summary
    problem, remedy = f"{run.summary} is damaged or was not written by a demo", f"delete {run.output}, or {_ELSEWHERE}"
    with user_errors(problem, remedy, ValueError, TypeError, KeyError, AttributeError):
        summary = json.loads(run.summary.read_text())
        changed = [name for name, value in recipe.items() if summary["recipe"].get(name) != value]
    if changed:
        raise UserError(f"{run.output} contains a demo with another {', '.join(changed)}; delete it, or {_ELSEWHERE}")
    return summary
