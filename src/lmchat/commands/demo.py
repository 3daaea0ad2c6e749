"""``lmchat demo``: the whole pipeline, small, offline, on text that is on this machine.

Stages run in order, each a function from `Demo` to its row of figures. The figures of a finished stage are in
``summary.json`` from then on, so a second run continues with the first stage that is not there.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmchat.checkpoint.layout import STAGE_FOLDERS, committed_steps
from lmchat.types import UserError

if TYPE_CHECKING:
    from rich.table import Table

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
LMCHAT = Path(sys.executable).with_name("lmchat")
PRETRAIN_CONFIG = "demo_pretrain.yaml"
VOCAB_SIZE = 4096
VALIDATION_SHARE = 0.05
OVERHEAD_MINUTES = 1.0
"""Kept free for starting processes, the last evaluation and the last checkpoint."""
TAG = "demo"

Figures = dict[str, Any]


@dataclass(frozen=True)
class Demo:
    """One run of the demo.

    Args:
        output: folder that everything goes to.
        text: the user's text; None is this machine's documentation.
        minutes: time to take, from now on.
    """

    output: Path
    text: Path | None
    minutes: float
    started: float = field(default_factory=time.perf_counter)

    @property
    def minutes_left(self) -> float:
        return self.minutes - (time.perf_counter() - self.started) / 60

    @property
    def data_dir(self) -> Path:
        return self.output / "base_data"

    @property
    def tokenizer_dir(self) -> Path:
        return self.output / "tokenizer"

    @property
    def summary(self) -> Path:
        return self.output / "summary.json"

    def recipe(self) -> dict[str, str]:
        """What the figures depend on. Stages of another recipe are not continued."""
        config = CONFIGS / PRETRAIN_CONFIG
        if not config.is_file():
            raise UserError(f"no config {config}; the demo runs from a clone of the repository (pip install -e .)")
        return {
            "text": str(self.text.resolve()) if self.text else "this machine's documentation",
            "vocab_size": str(VOCAB_SIZE),
            PRETRAIN_CONFIG: hashlib.sha256(config.read_bytes()).hexdigest()[:16],
        }


def demo(text: Path | None = None, output: Path = Path("runs/demo"), minutes: float = 15) -> None:
    """Train a tokenizer and a small GPT on real text, offline, and show how well it does.

    Run again after an interruption to continue.

    Args:
        text: folder of your own text (.txt, .md, .rst, .jsonl or .parquet); by default the documentation of Python
            and its packages on this machine.
        output: folder for data, tokenizer, checkpoints, logs and summary.json.
        minutes: time to take at most; on a slow machine the model is trained for fewer steps.
    """
    from rich.console import Console

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
        figures = stage(run)
        summary["stages"][name] = {"seconds": round(time.perf_counter() - started, 1), **figures}
        summary["minutes"] = round(sum(figures["seconds"] for figures in summary["stages"].values()) / 60, 2)
        _write_json(run.summary, summary)
    console.print(_table(summary))
    console.print(f"These figures are in {run.summary}. Next, train the model for as long again:")
    console.print(f"  {_next_command(run, summary)}", soft_wrap=True, highlight=False)


COMMANDS = demo


def collect_text(run: Demo) -> Figures:
    """Shards of text in ``base_data``, the last one held out."""
    shutil.rmtree(run.data_dir, ignore_errors=True)  # of an interrupted run
    if run.text is not None:
        from lmchat.data.importing import import_folder

        imported = import_folder(run.text, run.data_dir, validation_fraction=VALIDATION_SHARE).shards
        documents = imported.train_documents + imported.validation_documents
        return {"documents": documents, "megabytes": round(imported.characters / 1e6, 2)}
    from rich.console import Console

    from lmchat.data.local_corpus import collect_documentation

    report = collect_documentation(run.data_dir, validation_share=VALIDATION_SHARE)
    Console().print(report.table())
    return {"documents": report.documents, "megabytes": round(report.characters / 1e6, 2)}


def train_tokenizer(run: Demo) -> Figures:
    """A byte-level BPE on the training shards."""
    from lmchat.commands.tokenizer import train

    train(data=run.data_dir, vocab_size=VOCAB_SIZE, output=run.tokenizer_dir)
    return {"vocab_size": VOCAB_SIZE}


def tokenize(run: Demo) -> Figures:
    """Token files of all shards."""
    from lmchat.data.token_shards import TokenShards, prepare_token_shards
    from lmchat.tokenizer.bpe import Tokenizer

    tokenizer = Tokenizer.load(run.tokenizer_dir)
    prepare_token_shards(run.data_dir, tokenizer)
    train, validation = TokenShards.open_split(run.data_dir, tokenizer)
    print(f"{train.tokens:,} tokens to train on, {validation.tokens:,} held out")
    return {"tokens": train.tokens, "validation_tokens": validation.tokens}


def measure_baselines(run: Demo) -> Figures:
    """What compressors and an n-gram model make of the held-out text."""
    from lmchat.data.parquet_text import list_shards, read_documents
    from lmchat.evaluation.compression_baseline import compression_baselines

    *train, validation = list_shards(run.data_dir)
    baselines = compression_baselines(
        (text or "" for shard in train for text in read_documents(shard)),
        (text or "" for text in read_documents(validation)),
    )
    print(f"bits per byte: gzip {baselines.gzip:.3f}, xz {baselines.xz:.3f}, n-gram model {baselines.ngram:.3f}")
    return {f"{name}_bpb": round(value, 4) for name, value in asdict(baselines).items()}


def pretrain(run: Demo) -> Figures:
    """A GPT on the token files, from the last checkpoint if there is one."""
    budget = max(run.minutes_left - OVERHEAD_MINUTES, 0.1)
    _fit(
        run,
        "pretrain",
        PRETRAIN_CONFIG,
        "--trainer.callbacks+=lmchat.callbacks.time_budget.TimeBudget",
        f"--trainer.callbacks.minutes={budget}",
    )
    rows = read_log(run.output / "logs" / "pretrain" / TAG)
    bits = [row["val/bpb"] for row in rows if "val/bpb" in row]
    speeds = sorted(row["train/tokens_per_second"] for row in rows if "train/tokens_per_second" in row)
    if not bits or not speeds:
        raise UserError(
            f"no figures in the log of pretraining under {run.output / 'logs'}; delete the folder, run again"
        )
    return {
        "steps": committed_steps(run.output / STAGE_FOLDERS["pretrain"] / TAG)[-1],
        "tokens": int(max(row["train/tokens"] for row in rows if "train/tokens" in row)),
        "tokens_per_second": round(speeds[len(speeds) // 2]),
        "bpb_before": round(bits[0], 4),
        "bpb_after": round(bits[-1], 4),
    }


STAGES: dict[str, tuple[str, Callable[[Demo], Figures]]] = {
    "corpus": ("Find text", collect_text),
    "tokenizer": ("Train a tokenizer", train_tokenizer),
    "tokens": ("Tokenize the text", tokenize),
    "baselines": ("Measure simple models, for comparison", measure_baselines),
    "pretrain": ("Train a GPT", pretrain),
}
"""Stage by its name in ``summary.json``: the heading, and what it does."""


def read_log(folder: Path) -> list[dict[str, float]]:
    """The rows of all CSV logs under a folder in the order of their steps; without the cells that are empty."""
    rows = []
    for path in folder.rglob("metrics.csv"):
        with path.open(newline="") as file:
            rows += [{key: float(value) for key, value in row.items() if key and value} for row in csv.DictReader(file)]
    return sorted(rows, key=lambda row: row.get("step", 0))


def _fit(run: Demo, stage: str, config: str, *options: str) -> None:
    """``lmchat fit``, in a process of its own, which continues from its last checkpoint."""
    command = ["fit", "--config", str(CONFIGS / config), "--model.tag", TAG, *options]
    if committed_steps(run.output / STAGE_FOLDERS[stage] / TAG):
        command += ["--ckpt_path", "last"]
    status = subprocess.run([sys.executable, "-m", "lmchat", *command], env=_offline(run), check=False).returncode
    if status:
        raise UserError(
            f"the stage {stage} failed with exit status {status}, its message is above; "
            "`lmchat demo` with the same options continues from where it was"
        )


def _offline(run: Demo) -> dict[str, str]:
    """The environment of a stage: files under the demo's folder, no network."""
    offline = dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"), "1")
    return {**os.environ, **offline, "LMCHAT_BASE_DIR": str(run.output.resolve())}


def _open_summary(run: Demo) -> dict[str, Any]:
    """The summary of an earlier run of the same recipe, or an empty one."""
    recipe = run.recipe()
    if not run.summary.exists():
        if run.output.exists() and (not run.output.is_dir() or any(run.output.iterdir())):
            raise UserError(f"{run.output} holds something else than a demo; choose another folder with --output")
        summary = {"minutes": 0.0, "recipe": recipe, "stages": {}}
        run.output.mkdir(parents=True, exist_ok=True)
        _write_json(run.summary, summary)
        return summary
    summary = json.loads(run.summary.read_text())
    if changed := [name for name, value in recipe.items() if summary["recipe"].get(name) != value]:
        raise UserError(
            f"{run.output} holds a demo with another {', '.join(changed)}; delete it, or choose another folder with "
            "--output"
        )
    return summary


def _write_json(path: Path, content: dict[str, Any]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    temporary.replace(path)


def _table(summary: dict[str, Any]) -> Table:
    from rich.table import Table

    table = Table("stage", title=f"The demo took {summary['minutes']:.1f} minutes")
    for column in ("tokens", "time", "tokens/s", "bits per byte"):
        table.add_column(column, justify="right")
    for name, figures in summary["stages"].items():
        table.add_row(
            name,
            f"{figures['tokens']:,}" if "tokens" in figures else "",
            f"{figures['seconds']:.0f} s",
            f"{figures['tokens_per_second']:,}" if "tokens_per_second" in figures else "",
            f"{figures['bpb_before']:.3f} → {figures['bpb_after']:.3f}" if "bpb_after" in figures else "",
        )
    table.add_section()
    for name, title in (("gzip", "gzip -9"), ("xz", "xz -9e"), ("ngram", "n-gram model")):
        table.add_row(title, "", "", "", f"{summary['stages']['baselines'][f'{name}_bpb']:.3f}", style="dim")
    return table


def _next_command(run: Demo, summary: dict[str, Any]) -> str:
    """Trains the model for as long again."""
    steps = summary["stages"]["pretrain"]["steps"]
    options = f"--model.tag {TAG} --ckpt_path last --trainer.max_steps {2 * steps}"
    return f"LMCHAT_BASE_DIR={run.output} {_short(LMCHAT)} fit --config {_short(CONFIGS / PRETRAIN_CONFIG)} {options}"


def _short(path: Path) -> str:
    """The path from here if it is below."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
