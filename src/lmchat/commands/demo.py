"""``lmchat demo``: the whole pipeline, small, offline, on text that is on this machine.

Stages run in order, each a function from `Demo` to its row of figures. The figures of a finished stage are in
``summary.json`` from then on, so a second run continues with the first stage that is not there.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmchat.checkpoint.layout import STAGE_FOLDERS, CheckpointPaths, committed_steps
from lmchat.types import UserError

if TYPE_CHECKING:
    from rich.table import Table

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
LMCHAT = Path(sys.executable).with_name("lmchat")
PRETRAIN_CONFIG = "demo_pretrain.yaml"
VOCAB_SIZE = 4096
VALIDATION_SHARE = 0.05
FEW_FILES = 20
"""Fewer plain text files than this are cut into paragraphs, so that some text of each kind can be held out."""
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
    def checkpoints(self) -> Path:
        return self.output / STAGE_FOLDERS["pretrain"] / TAG

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
        text: folder of your own text (.txt, .md, .rst, .jsonl or .parquet), a few MB or more; by default the
            documentation of Python and its packages on this machine.
        output: folder for data, tokenizer, checkpoints, logs and summary.json.
        minutes: time to take at most; on a slow machine the model is trained for fewer steps.
    """
    from rich.console import Console

    console = Console()
    run = Demo(output.expanduser(), text.expanduser() if text else None, minutes)
    summary = _open_summary(run)
    for number, (name, (title, stage)) in enumerate(STAGES.items(), start=1):
        heading = f"[bold]\\[{number}/{len(STAGES)}] {title}[/bold]"
        if name in summary["stages"]:
            console.print(f"{heading}: done in an earlier run, {summary['stages'][name]['seconds']:.0f} s")
            continue
        console.print(heading)
        started = time.perf_counter()
        try:
            figures = stage(run)
        except KeyboardInterrupt:
            console.print("Interrupted. Run the same command again to continue.")
            raise
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

        imported = import_folder(
            run.text, run.data_dir, separator=_separator(run.text), validation_fraction=VALIDATION_SHARE
        ).shards
        documents = imported.train_documents + imported.validation_documents
        return {"documents": documents, "megabytes": round(imported.characters / 1e6, 2)}
    from rich.console import Console

    from lmchat.data.local_corpus import collect_documentation

    report = collect_documentation(run.data_dir, validation_share=VALIDATION_SHARE)
    Console().print(report.table())
    return {"documents": report.documents, "megabytes": round(report.characters / 1e6, 2)}


def _separator(text: Path) -> str | None:
    """What cuts the user's plain text into documents: nothing if there are files enough, else blank lines or lines."""
    from lmchat.data.importing import PLAIN_SUFFIXES

    found = [text] if text.is_file() else [path for path in text.rglob("*") if path.is_file()]
    files = [path for path in found if path.suffix.lower() in PLAIN_SUFFIXES]
    if len(files) >= FEW_FILES:
        return None
    try:
        content = b"\n".join(path.read_bytes() for path in files)
    except OSError:
        return None  # the import says which file it is
    paragraph_breaks = ("\r\n\r\n", "\n\n")
    return next((cut for cut in paragraph_breaks if content.count(cut.encode()) >= FEW_FILES), "\n")


def train_tokenizer(run: Demo) -> Figures:
    """A byte-level BPE on the training shards, with as many entries as the text gives."""
    from lmchat.commands.tokenizer import train
    from lmchat.tokenizer.bpe import TooFewMerges

    vocab_size = VOCAB_SIZE
    try:
        train(data=run.data_dir, vocab_size=vocab_size, output=run.tokenizer_dir)
    except TooFewMerges as error:
        vocab_size = error.possible_vocab_size
        print(f"this text is too small for {VOCAB_SIZE:,} entries; the tokenizer gets {vocab_size:,}")
        train(data=run.data_dir, vocab_size=vocab_size, output=run.tokenizer_dir)
    return {"vocab_size": vocab_size}


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
    from rich.console import Console

    from lmchat.data.parquet_text import list_shards, read_documents
    from lmchat.evaluation.compression_baseline import compression_baselines

    *train, validation = list_shards(run.data_dir)
    console, activity = Console(), "gzip, xz and an n-gram model are reading the text"
    if not console.is_terminal:
        console.print(activity)
    with console.status(activity):
        baselines = compression_baselines(
            (text or "" for shard in train for text in read_documents(shard)),
            (text or "" for text in read_documents(validation)),
        )
    print(f"bits per byte: gzip {baselines.gzip:.3f}, xz {baselines.xz:.3f}, n-gram model {baselines.ngram:.3f}")
    return {f"{name}_bpb": round(value, 4) for name, value in asdict(baselines).items()}


def pretrain(run: Demo) -> Figures:
    """A GPT on the token files, from the last checkpoint if there is one."""
    budget = max(run.minutes_left - OVERHEAD_MINUTES, 0.1)
    _lmchat(
        run,
        "fit",
        "--trainer.callbacks+=lmchat.callbacks.time_budget.TimeBudget",
        f"--trainer.callbacks.minutes={budget}",
        *_from_last_checkpoint(run),
    )
    logs = run.output / "logs" / "pretrain" / TAG
    rows = read_log(logs)
    bits = {int(row["step"]): row["val/bpb"] for row in rows if "val/bpb" in row}
    speeds = sorted(row["train/tokens_per_second"] for row in rows if "train/tokens_per_second" in row)
    if not speeds:
        raise UserError(f"no figures in the log of pretraining under {logs}; delete {run.output}, run again")
    steps = committed_steps(run.checkpoints)[-1]
    meta = json.loads(CheckpointPaths(run.checkpoints, steps).meta.read_bytes())
    # A run that was killed may have lost the first record, one stopped before its last evaluation lacks the last.
    before = {"bpb_before": round(bits[0], 4)} if 0 in bits else {}
    after = bits[steps] if steps in bits else evaluate(run)
    return {
        "steps": steps,
        "tokens": steps * meta["global_batch_tokens"],
        "tokens_per_second": round(speeds[len(speeds) // 2]),
        **before,
        "bpb_after": round(after, 4),
    }


def evaluate(run: Demo) -> float:
    """Bits per byte of the last checkpoint on the held-out text."""
    logs = run.output / "logs" / "evaluation"
    shutil.rmtree(logs, ignore_errors=True)
    _lmchat(
        run,
        "validate",
        "--trainer.logger=lightning.pytorch.loggers.CSVLogger",
        f"--trainer.logger.save_dir={logs.resolve()}",
        *_from_last_checkpoint(run),
    )
    return read_log(logs)[-1]["val/bpb"]


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


def _from_last_checkpoint(run: Demo) -> list[str]:
    """Options that continue from the last checkpoint, if there is one."""
    return ["--ckpt_path", "last"] if committed_steps(run.checkpoints) else []


def _lmchat(run: Demo, command: str, *options: str) -> None:
    """``lmchat fit`` or ``validate`` with the demo's config, in a process of its own."""
    arguments = [command, "--config", str(CONFIGS / PRETRAIN_CONFIG), "--model.tag", TAG, *options]
    process = subprocess.Popen([sys.executable, "-m", "lmchat", *arguments], env=_offline(run))
    try:
        status = process.wait()
    except KeyboardInterrupt:
        # Ctrl-C in a terminal reaches the child too, which is saving a checkpoint; subprocess.run would kill it.
        process.wait()
        raise
    if status:
        raise UserError(
            f"the stage pretrain failed with exit status {status}, its message is above; "
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
            raise UserError(
                f"{run.output} holds something else than a demo; choose another folder with --output "
                "(make demo OUTPUT=folder)"
            )
        summary = {"minutes": 0.0, "recipe": recipe, "stages": {}}
        run.output.mkdir(parents=True, exist_ok=True)
        _write_json(run.summary, summary)
        return summary
    summary = json.loads(run.summary.read_text())
    if changed := [name for name, value in recipe.items() if summary["recipe"].get(name) != value]:
        raise UserError(
            f"{run.output} holds a demo with another {', '.join(changed)}; delete it, or choose another folder with "
            "--output (make demo OUTPUT=folder)"
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
            " → ".join(f"{figures[bits]:.3f}" for bits in ("bpb_before", "bpb_after") if bits in figures),
        )
    table.add_section()
    for name, title in (("gzip", "gzip -9"), ("xz", "xz -9e"), ("ngram", "n-gram model")):
        table.add_row(title, "", "", "", f"{summary['stages']['baselines'][f'{name}_bpb']:.3f}", style="dim")
    return table


def _next_command(run: Demo, summary: dict[str, Any]) -> str:
    """Trains the model for as long again."""
    steps = summary["stages"]["pretrain"]["steps"]
    config, output = shlex.quote(_short(CONFIGS / PRETRAIN_CONFIG)), shlex.quote(str(run.output))
    options = f"--model.tag {TAG} --ckpt_path last --trainer.max_steps {2 * steps}"
    return f"LMCHAT_BASE_DIR={output} {shlex.quote(_short(LMCHAT))} fit --config {config} {options}"


def _short(path: Path) -> str:
    """The path from here if it is below."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
