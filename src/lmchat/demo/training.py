"""The demo's training stages and the metrics read from their logs."""

from __future__ import annotations

import shutil
from statistics import median_low

from lmchat.checkpoint.layout import committed_steps
from lmchat.demo.run import Demo, Metrics, lmchat, read_log, start_from, within
from lmchat.types import UserError

PRETRAIN_SHARE = 0.22
"""Share of the remaining time for pretraining; fine-tuning always runs a full epoch."""
OVERHEAD_MINUTES = 1.25
"""Minutes reserved for process starts, evaluations and the last checkpoint."""
SKILLS = {
    "identity": "val/Identity/test",
    "spelling": "val/SimpleSpelling/test",
    "counting": "val/SpellingBee/test",
    "arithmetic_taught": "val/Arithmetic/test/12 families",
}
"""Accuracies on held-out questions: key in the summary, and in the logs."""
NEW_ARITHMETIC = "val/Arithmetic/test/4 families"
"""Accuracy on word problems of families held out of SFT; the RL stage logs it as ``val/pass@1``."""

Record = dict[str, float]


def pretrain(run: Demo) -> Metrics:
    """Pretrains a GPT on the token files."""
    lmchat(run, "fit", "pretrain", *within(PRETRAIN_SHARE * run.minutes_left), *start_from(run, "pretrain"))
    metrics = _progress(run, "pretrain")
    # A run that was killed may have lost its first record.
    first = [row["val/bpb"] for row in _held_out_rows(run, "pretrain") if row["step"] == 0]
    before = {"bpb_before": round(first[0], 4)} if first else {}
    return {**metrics, **before, "bpb_after": round(_last_evaluation(run, "pretrain")["val/bpb"], 4)}


def finetune(run: Demo) -> Metrics:
    """Fine-tunes the base model to a chat model, for one epoch over the mixture."""
    lmchat(run, "fit", "sft", *start_from(run, "sft", "pretrain"))
    metrics, held_out = _progress(run, "sft"), _last_evaluation(run, "sft")
    return {**metrics, **_skills(held_out), "arithmetic_pass_at_1": round(held_out[NEW_ARITHMETIC], 3)}


def reinforce(run: Demo) -> Metrics:
    """Trains the chat model by RL on word problems of families held out of SFT."""
    budget = run.minutes_left - OVERHEAD_MINUTES
    lmchat(run, "fit", "rl", *within(budget), *start_from(run, "rl", "sft"))
    metrics, held_out = _progress(run, "rl"), _last_evaluation(run, "rl")
    return {**metrics, **_skills(held_out), "arithmetic_pass_at_1": round(held_out["val/pass@1"], 3)}


def _progress(run: Demo, stage: str) -> Metrics:
    rows = read_log(run.logs(stage))
    speeds = [row["train/tokens_per_second"] for row in rows if "train/tokens_per_second" in row]
    if not speeds:
        raise UserError(f"no metrics in the log of {stage} under {run.logs(stage)}; delete {run.output}, run again")
    tokens = max(row["train/tokens"] for row in rows if "train/tokens" in row)
    return {"steps": _last_step(run, stage), "tokens": int(tokens), "tokens_per_second": round(median_low(speeds))}


def _skills(held_out: Record) -> Metrics:
    return {name: round(held_out[key], 3) for name, key in SKILLS.items()}


def _last_step(run: Demo, stage: str) -> int:
    return committed_steps(run.checkpoints(stage))[-1]


def _held_out_rows(run: Demo, stage: str) -> list[Record]:
    return [row for row in read_log(run.logs(stage)) if any(key.startswith("val/") for key in row)]


def _last_evaluation(run: Demo, stage: str) -> Record:
    """Held-out metrics of the last checkpoint; evaluates it if the run stopped before its last evaluation."""
    last = [row for row in _held_out_rows(run, stage) if row["step"] == _last_step(run, stage)]
    return last[-1] if last else evaluate(run, stage)


def evaluate(run: Demo, stage: str) -> Record:
    """Held-out metrics of the stage's last checkpoint."""
    logs = run.output / "logs" / "evaluation" / stage
    shutil.rmtree(logs, ignore_errors=True)
    lmchat(
        run,
        "validate",
        stage,
        "--trainer.logger=lightning.pytorch.loggers.CSVLogger",
        f"--trainer.logger.save_dir={logs.resolve()}",
        *start_from(run, stage),
    )
    return read_log(logs)[-1]
