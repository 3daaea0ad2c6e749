"""One run of the demo: its paths, and functions to run its stages and read their logs."""

import hashlib
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from lmchat.checkpoint.layout import committed_steps
from lmchat.stage_table import STAGES
from lmchat.types import UserError

with resources.as_file(resources.files(__package__) / "configs") as _configs:
    CONFIGS = _configs  # a folder on disk, since the package is never imported from an archive
VOCAB_SIZE = 1024
TAG = "demo"

Metrics = dict[str, Any]


@dataclass(frozen=True)
class Demo:
    """One run of the demo.

    Args:
        output: output folder.
        text: the user's text; None uses the documentation installed on this machine.
        minutes: time budget, counted from construction of this object.
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
    def words(self) -> Path:
        return self.output / "words.txt"

    @property
    def summary(self) -> Path:
        return self.output / "summary.json"

    def checkpoints(self, stage: str) -> Path:
        return self.output / STAGES[stage].checkpoints / TAG

    def config(self, stage: str) -> Path:
        """Path of the stage's config in the package."""
        return CONFIGS / f"{stage}.yaml"

    def recipe(self) -> dict[str, str]:
        """Settings that the results depend on; only runs with an equal recipe are resumed."""
        return {
            "text": os.path.realpath(self.text) if self.text else "this machine's documentation",
            "vocab_size": str(VOCAB_SIZE),
            **{f"config of {name}": hashlib.sha256(self.config(name).read_bytes()).hexdigest()[:16] for name in STAGES},
        }

    def environment(self) -> dict[str, str]:
        """Environment of a stage's process: base folder is the output folder, Hugging Face libraries offline."""
        offline = dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"), "1")
        return {**os.environ, **offline, "LMCHAT_BASE_DIR": str(self.output.resolve())}


def lmchat(run: Demo, command: str, stage: str, *options: str) -> None:
    """Runs ``lmchat fit`` or ``validate`` with the stage's config in a subprocess."""
    arguments = [command, "--config", str(run.config(stage)), "--model.tag", TAG, *options]
    process = subprocess.Popen([sys.executable, "-m", "lmchat", *arguments], env=run.environment())
    try:
        status = process.wait()
    except KeyboardInterrupt:
        # Ctrl-C reaches the child too, which then saves a checkpoint; subprocess.run would kill it.
        process.wait()
        raise
    if status:
        resume = "`lmchat demo` with the same options resumes it"
        raise UserError(f"the stage {stage} failed with exit status {status}, see its message above; {resume}")


def start_from(run: Demo, stage: str, earlier: str | None = None) -> list[str]:
    """Options that resume from the stage's last checkpoint, or start from the earlier stage's."""
    if committed_steps(run.checkpoints(stage)):
        return ["--ckpt_path", "last"]
    return ["--ckpt_path", str(run.checkpoints(earlier).resolve())] if earlier else []


def within(minutes: float) -> list[str]:
    """Options that limit training to a time budget."""
    return [
        "--trainer.callbacks+=lmchat.demo.time_budget.TimeBudget",
        f"--trainer.callbacks.minutes={max(minutes, 0.1)}",
    ]
