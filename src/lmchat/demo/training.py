"""The demo's training stages, and what their logs say about them."""

from __future__ import annotations

import shutil
from statistics import median_low

from lmchat.checkpoint.layout import committed_steps
from lmchat.demo.run import Demo, Metrics, lmchat, read_log, start_from, within
from lmchat.types import UserError

PRETRAIN_SHARE = 0.22
"""Of the time that is left, what pretraining may take: fine-tuning gets its full epoch after it."""
OVERHEAD_MINUTES = 1.25
"""Kept free for starting processes, the evaluations to come and the last checkpoint."""
SKILLS = {
    "identity": "val/Identity/test",
    "spelling": "val/SimpleSpelling/test",
    "counting": "val/SpellingBee/test",
    "arithmetic_taught": "val/Arithmetic/test/12 families",
}
"""Shares of right answers to held-out questions: name in the summary, and in the logs."""
NEW_ARITHMETIC = "val/Arithmetic/test/4 families"
"""That of word problems of the kinds that fine-tuning does not show; where they are practised, it is ``val/pass@1``."""

Row = dict[str, float]


def pretrain(run: Demo) -> Metrics:
    """A GPT on the token files."""
    lmchat(run, "fit", "pretrain", *within(PRETRAIN_SHARE * run.minutes_left), *start_from(run, "pretrain"))
    figures = _progress(run, "pretrain")
    # A run that was killed may have lost its first record.
    first = [row["val/bpb"] for row in _held_out_rows(run, "pretrain") if row["step"] == 0]
    before = {"bpb_before": round(first[0], 4)} if first else {}
    return {**figures, **before, "bpb_after": round(_last_evaluation(run, "pretrain")["val/bpb"], 4)}


def finetune(run: Demo) -> Metrics:
    """A chat model of the base model, in one epoch over the mixture."""
    lmchat(run, "fit", "sft", *start_from(run, "sft", "pretrain"))
    figures, held_out = _progress(run, "sft"), _last_evaluation(run, "sft")
    return {**figures, **_skills(held_out), "arithmetic_pass_at_1": round(held_out[NEW_ARITHMETIC], 3)}


def reinforce(run: Demo) -> Metrics:
    """The chat model after practising word problems of kinds that fine-tuning did not show."""
    budget = run.minutes_left - OVERHEAD_MINUTES
    lmchat(run, "fit", "rl", *within(budget), *start_from(run, "rl", "sft"))
    figures, held_out = _progress(run, "rl"), _last_evaluation(run, "rl")
    return {**figures, **_skills(held_out), "arithmetic_pass_at_1": round(held_out["val/pass@1"], 3)}


def _progress(run: Demo, stage: str) -> Metrics:
    rows = read_log(run.logs(stage))
    speeds = [row["train/tokens_per_second"] for row in rows if "train/tokens_per_second" in row]
    if not speeds:
        raise UserError(f"no figures in the log of {stage} under {run.logs(stage)}; delete {run.output}, run again")
    tokens = max(row["train/tokens"] for row in rows if "train/tokens" in row)
    return {"steps": _last_step(run, stage), "tokens": int(tokens), "tokens_per_second": round(median_low(speeds))}


def _skills(held_out: Row) -> Metrics:
    return {name: round(held_out[key], 3) for name, key in SKILLS.items()}


def _last_step(run: Demo, stage: str) -> int:
    return committed_steps(run.checkpoints(stage))[-1]


def _held_out_rows(run: Demo, stage: str) -> list[Row]:
    return [row for row in read_log(run.logs(stage)) if any(key.startswith("val/") for key in row)]


def _last_evaluation(run: Demo, stage: str) -> Row:
    """Held-out figures of the last checkpoint; a run that stopped before its last evaluation is evaluated now."""
    last = [row for row in _held_out_rows(run, stage) if row["step"] == _last_step(run, stage)]
    return last[-1] if last else evaluate(run, stage)


def evaluate(run: Demo, stage: str) -> Row:
    """Held-out figures of the stage's last checkpoint."""
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
