"""The demo's report: tables of all stages and training curves."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmchat.demo.run import Demo, Metrics, read_log

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.table import Table

SKILLS = {
    "identity": "identity",
    "spelling": "spelling",
    "counting": "letter counts",
    "arithmetic_taught": "problems, families in SFT",
    "arithmetic_pass_at_1": "problems, families only in RL",
}
"""Accuracies on held-out questions: key in the summary and column heading."""
BASELINES = {"gzip_bpb": "gzip -9", "xz_bpb": "xz -9e", "ngram_bpb": "n-gram model"}
REWARD_WINDOW = 10
"""Window of the reward curve's moving average, in optimizer steps."""


def time_table(summary: dict[str, Any]) -> Table:
    """Time and speed of each stage, and bits per byte of held-out text."""
    table = _table("stage", "tokens", "time", "tokens/s", "bits per byte")
    table.title = f"The demo took {summary['minutes']:.1f} minutes"
    for name, metrics in summary["stages"].items():
        table.add_row(
            name,
            f"{metrics['tokens']:,}" if "tokens" in metrics else "",
            f"{metrics['seconds']:.0f} s",
            f"{metrics['tokens_per_second']:,}" if "tokens_per_second" in metrics else "",
            " → ".join(f"{metrics[bits]:.3f}" for bits in ("bpb_before", "bpb_after") if bits in metrics),
        )
    table.add_section()
    for name, title in BASELINES.items():
        table.add_row(title, "", "", "", f"{summary['stages']['baselines'][name]:.3f}", style="dim")
    return table


def skills_table(summary: dict[str, Any]) -> Table:
    """Accuracy on held-out questions after each stage."""
    table = _table("after", *SKILLS.values())
    table.title = "Accuracy on held-out questions"
    for name, metrics in summary["stages"].items():
        if SKILLS.keys() <= metrics.keys():
            table.add_row(name, *(f"{metrics[skill]:.1%}" for skill in SKILLS))
    return table


def _table(first: str, *columns: str) -> Table:
    from rich.table import Table

    table = Table(first)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def draw_curves(run: Demo) -> Metrics:
    """Draws ``curves.png``: held-out bits per byte, fine-tuning loss, and pass@1 in RL by optimizer step."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("curves skipped: matplotlib is not installed (pip install 'lmchat[plot]')")
        return {}
    figure = Figure(figsize=(13, 3.6), layout="constrained")
    pretrain, sft, rl = figure.subplots(1, 3)
    _curve(pretrain, run.logs("pretrain"), "val/bpb", "held-out text", marker="o")
    _titles(pretrain, "Pretraining", "bits per byte")
    _curve(sft, run.logs("sft"), "train/loss_ema", "training", linewidth=1)
    _titles(sft, "Fine-tuning", "loss on assistant tokens, nats")
    sft.set_yscale("log")
    _curve(rl, run.logs("rl"), "train/pass@1", f"training, {REWARD_WINDOW}-step mean", window=REWARD_WINDOW)
    _curve(rl, run.logs("rl"), "val/pass@1", "held-out problems", marker="o")
    _titles(rl, "Reinforcement learning", "accuracy")
    path = run.output / "curves.png"
    figure.savefig(path, dpi=120)
    print(f"Training curves: {path}")
    return {"curves": path.name}


def write_run_report(run: Demo) -> Metrics:
    """``report.html`` and ``report.md``: what each stage was trained with and what came out of it."""
    from lmchat.report.page import write_report
    from lmchat.report.runs import read_run

    path = run.output / "report.html"
    write_report([read_run(str(run.output))], path)
    print(f"Report: {path}")
    return {"report": path.name}


def _curve(axes: Axes, logs: Path, key: str, label: str, window: int = 1, **style: Any) -> None:
    points = [(row["step"], row[key]) for row in read_log(logs) if key in row]
    steps, values = zip(*points, strict=True)
    means = [sum(values[max(0, i - window + 1) : i + 1]) / min(i + 1, window) for i in range(len(values))]
    axes.plot(steps, means, label=label, **style)


def _titles(axes: Axes, title: str, quantity: str) -> None:
    axes.set_title(title)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(quantity)
    axes.grid(alpha=0.3)
    axes.legend()
