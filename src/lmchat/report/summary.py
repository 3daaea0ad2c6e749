"""Tables of a report: origin, cost and final metrics of every stage of the runs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lmchat.evaluation.intervals import Z_95
from lmchat.evaluation.results import Result
from lmchat.progress import clock_time
from lmchat.report.charts import number
from lmchat.report.runs import Run, StageRun

TITLES = {"pretrain": "Pretraining", "sft": "Fine-tuning", "rl": "Reinforcement learning"}

METRICS = {
    "val/bpb": "bits per byte, held out",
    "val/pass@1": "pass@1, held out",
    "val/core": "CORE",
    "val/chat_core": "ChatCORE",
    "train/loss_ema": "training loss (moving average), nats",
    "train/reward": "mean reward",
    "train/pass@1": "share of full rewards, training",
    "train/length": "sampled tokens per answer",
    "train/logprob_gap": "gap of engine and training log-probabilities, nats",
    "train/lr_multiplier": "learning rate multiplier",
    "train/tokens_per_second": "tokens/s",
    "train/mfu": "MFU",
}
"""Metrics that have a chart, in this order, and their labels. Other ``val/`` metrics follow under their own names."""


@dataclass(frozen=True)
class Table:
    """A table of texts; if ``numeric``, all columns but the first have numbers."""

    header: list[str]
    rows: list[list[str]]
    numeric: bool = False


def columns(runs: Sequence[Run]) -> list[tuple[str, StageRun]]:
    """Every stage of every run with its heading."""
    several = len(runs) > 1
    return [
        (f"{run.name}: {TITLES[name]}" if several else TITLES[name], stage)
        for name in TITLES
        for run in runs
        if (stage := run.stages.get(name))
    ]


def label(metric: str) -> str:
    return METRICS.get(metric, metric.removeprefix("val/").removeprefix("train/"))


def charted_metrics(stages: Sequence[StageRun]) -> list[str]:
    """Metrics with a chart: those that were logged more than once."""
    logged = {metric for stage in stages for metric in stage.metrics if stage.has_curve(metric)}
    return [
        *(metric for metric in METRICS if metric in logged),
        *sorted(metric for metric in logged if metric.startswith("val/") and metric not in METRICS),
    ]


def final_metrics(runs: Sequence[Run]) -> Table:
    """Last value of each evaluation metric, and results of evaluations, with their 95 % intervals."""
    shown = columns(runs)
    logged = {
        metric
        for _, stage in shown
        for metric in stage.metrics
        # A task of CORE and ChatCORE is shown once, as a result.
        if metric.startswith("val/") and not (metric.count("/") == 2 and metric.rpartition("/")[2] in stage.results)
    }
    ordered = [metric for metric in METRICS if metric in logged] + sorted(logged - METRICS.keys())
    rows = [[label(metric), *(_final(stage, metric) for _, stage in shown)] for metric in ordered]
    tasks = dict.fromkeys(task for _, stage in shown for task in stage.results)
    rows += [[f"{task}, evaluated", *(_result(stage, task) for _, stage in shown)] for task in tasks]
    return Table(["", *(heading for heading, _ in shown)], rows, numeric=True)


def effort(runs: Sequence[Run]) -> Table:
    """Size, steps, tokens, time and speed of each stage."""
    rows = []
    for heading, stage in columns(runs):
        tokens, speed = stage.final("train/tokens"), stage.final("train/tokens_per_second")
        rows.append(
            [
                heading,
                f"{stage.num_parameters:,}" if stage.num_parameters else "",
                f"{max(stage.records, default=0):,}",
                f"{tokens:,.0f}" if tokens is not None else "",
                clock_time(stage.seconds),
                f"{speed:,.0f}" if speed is not None else "",
            ]
        )
    return Table(["", "parameters", "steps", "tokens", "training time", "tokens/s"], rows, numeric=True)


def origin(stage: StageRun) -> Table:
    """Origin of a stage's result: facts about its last start."""
    facts = {"checkpoint": f"step {stage.meta['step']}, saved {stage.meta['saved_at']}" if stage.meta else "none"}
    if stage.starts:
        start = stage.starts[-1]
        code = start.get("commit") or "not from a git checkout"
        facts |= {
            "command": str(start.get("command")),
            "code": f"{code}{' with uncommitted changes' if start.get('dirty') else ''}",
            "versions": ", ".join(f"{name} {number}" for name, number in start.get("versions", {}).items()),
            "hardware": f"{start.get('ranks')} rank(s) on {start.get('device')}; {start.get('host')}",
            "seed": str(start.get("seed")),
            "data": _data(start.get("data")),
            "started": ", ".join(f"{each.get('started')} at step {each.get('first_step')}" for each in stage.starts),
        }
    if stage.meta:
        facts["tokenizer"] = str(stage.meta.get("tokenizer_fingerprint"))[:16]
    return Table([], [[name, value] for name, value in facts.items()])


def commands(run: Run) -> str:
    """The commands to repeat a run, one per stage; empty if not recorded."""
    return "\n".join(str(stage.starts[0].get("command")) for stage in run.stages.values() if stage.starts)


def _data(data: object) -> str:
    if isinstance(data, dict):
        return "; ".join(f"{name}: {value}" for name, value in data.items())
    return str(data)


def _final(stage: StageRun, metric: str) -> str:
    value = stage.final(metric)
    if value is None:
        return ""
    interval = stage.final_interval(metric)
    return f"{value:.3f}{_interval(interval)}" if interval else number(value)


def _interval(interval: Sequence[float] | None) -> str:
    return f" ({interval[0]:.3f} to {interval[1]:.3f})" if interval else ""


def _result(stage: StageRun, task: str) -> str:
    result = stage.results.get(task)
    if result is None:
        return ""
    if "error" in result:
        return "failed"
    value = result.get("accuracy", result.get("centered"))
    if value is None:
        return _harness_result(result)
    return f"{value:.3f}{_interval(result.get('interval_95'))}"


def _harness_result(result: Result) -> str:
    """The metrics of a task of lm-evaluation-harness, whose keys are ``METRIC,FILTER``."""
    shown = []
    for key, value in result.items():
        name, comma, kind = key.partition(",")
        if comma and not name.endswith("_stderr") and isinstance(value, float):
            error = result.get(f"{name}_stderr,{kind}")
            half = Z_95 * error if isinstance(error, float) else math.nan
            shown.append(f"{name} {value:.3f}{'' if math.isnan(half) else _interval((value - half, value + half))}")
    return ", ".join(shown)
