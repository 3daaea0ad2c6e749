"""The demo's training stages and the metrics read from their logs."""

from statistics import median_low

from lmchat.checkpoint.layout import committed_steps
from lmchat.demo.run import Demo, Metrics, lmchat, start_from, within
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
    "arithmetic_pass_at_1": "val/Arithmetic/test/4 families",
}
"""Accuracies on held-out questions: key in the summary, and in the logs; RL logs the last one as ``val/pass@1``."""


def pretrain(run: Demo) -> Metrics:
    """Pretrains a GPT on the token files."""
    lmchat(run, "fit", "pretrain", *within(PRETRAIN_SHARE * run.minutes_left), *start_from(run, "pretrain"))
    metrics, records = _results(run, "pretrain")
    # A run that was killed may have lost its first record.
    before = {"bpb_before": round(records[0]["val/bpb"], 4)} if "val/bpb" in records.get(0, {}) else {}
    return {**metrics, **before, "bpb_after": round(records[metrics["steps"]]["val/bpb"], 4)}


def finetune(run: Demo) -> Metrics:
    """Fine-tunes the base model to a chat model, for one epoch over the mixture."""
    lmchat(run, "fit", "sft", *start_from(run, "sft", "pretrain"))
    return _with_skills(*_results(run, "sft"))


def reinforce(run: Demo) -> Metrics:
    """Trains the chat model by RL on word problems of families held out of SFT."""
    budget = run.minutes_left - OVERHEAD_MINUTES
    lmchat(run, "fit", "rl", *within(budget), *start_from(run, "rl", "sft"))
    return _with_skills(*_results(run, "rl"))


def _results(run: Demo, stage: str) -> tuple[Metrics, dict[int, dict[str, float]]]:
    """Steps, tokens and speed of a stage, and its logged metrics by step.

    The last step is evaluated if the log has no evaluation of it.
    """
    from lmchat.report.runs import read_run  # imports torch

    step = committed_steps(run.checkpoints(stage))[-1]
    logged = read_run(str(run.output)).stages[stage]
    if not any(name.startswith("val/") for name in logged.records.get(step, {})):
        lmchat(run, "validate", stage, *start_from(run, stage))
        logged = read_run(str(run.output)).stages[stage]
    speeds = [record[name] for record in logged.records.values() if (name := "train/tokens_per_second") in record]
    if not speeds:
        raise UserError(f"no metrics in the log of {stage}; delete {run.output}, and run the demo again")
    tokens = int(logged.final("train/tokens") or 0)
    return {"steps": step, "tokens": tokens, "tokens_per_second": round(median_low(speeds))}, logged.records


def _with_skills(metrics: Metrics, records: dict[int, dict[str, float]]) -> Metrics:
    last = records[metrics["steps"]]
    return metrics | {name: round(last[key if key in last else "val/pass@1"], 3) for name, key in SKILLS.items()}
