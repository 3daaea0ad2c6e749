"""The demo's training stages and the metrics read from their logs."""

from __future__ import annotations

from statistics import median_low

from lmchat.checkpoint.layout import committed_steps
from lmchat.demo.run import Demo, Metrics, lmchat, start_from, within
from lmchat.report.runs import StageRun, read_run
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


def pretrain(run: Demo) -> Metrics:
    """Pretrains a GPT on the token files."""
    lmchat(run, "fit", "pretrain", *within(PRETRAIN_SHARE * run.minutes_left), *start_from(run, "pretrain"))
    logged, last = _logged(run, "pretrain")
    # A run that was killed may have lost its first record.
    first = logged.records.get(0, {})
    before = {"bpb_before": round(first["val/bpb"], 4)} if "val/bpb" in first else {}
    return {**_progress(logged), **before, "bpb_after": round(last["val/bpb"], 4)}


def finetune(run: Demo) -> Metrics:
    """Fine-tunes the base model to a chat model, for one epoch over the mixture."""
    lmchat(run, "fit", "sft", *start_from(run, "sft", "pretrain"))
    logged, last = _logged(run, "sft")
    return {**_progress(logged), **_skills(last, NEW_ARITHMETIC)}


def reinforce(run: Demo) -> Metrics:
    """Trains the chat model by RL on word problems of families held out of SFT."""
    budget = run.minutes_left - OVERHEAD_MINUTES
    lmchat(run, "fit", "rl", *within(budget), *start_from(run, "rl", "sft"))
    logged, last = _logged(run, "rl")
    return {**_progress(logged), **_skills(last, "val/pass@1")}


def _logged(run: Demo, stage: str) -> tuple[StageRun, dict[str, float]]:
    """The log of a stage, and its record of the last step; evaluates the last checkpoint if that was not logged."""
    logged = read_run(str(run.output)).stages[stage]
    step = committed_steps(run.checkpoints(stage))[-1]
    if not any(name.startswith("val/") for name in logged.records.get(step, {})):
        lmchat(run, "validate", stage, *start_from(run, stage))
        logged = read_run(str(run.output)).stages[stage]
    return logged, logged.records[step]


def _progress(logged: StageRun) -> Metrics:
    speeds = [record[name] for record in logged.records.values() if (name := "train/tokens_per_second") in record]
    if not speeds:
        raise UserError(f"the log of {logged.stage} has no metrics; delete the output folder, and run the demo again")
    tokens = logged.final("train/tokens") or 0
    return {"steps": max(logged.records), "tokens": int(tokens), "tokens_per_second": round(median_low(speeds))}


def _skills(last: dict[str, float], new_arithmetic: str) -> Metrics:
    keys = {**SKILLS, "arithmetic_pass_at_1": new_arithmetic}
    return {name: round(last[key], 3) for name, key in keys.items()}
