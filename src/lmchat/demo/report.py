"""What the demo shows at its end: a table of all stages, and the curves of their training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmchat.demo.run import Demo, Metrics, read_log

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.table import Table

SKILLS = {
    "identity": "says who it is",
    "spelling": "spells words",
    "counting": "counts letters",
    "arithmetic_taught": "solves problems it was taught",
    "arithmetic_pass_at_1": "solves new kinds of problems",
}
"""What is asked on held-out questions: name in the summary, and heading."""
BASELINES = {"gzip_bpb": "gzip -9", "xz_bpb": "xz -9e", "ngram_bpb": "n-gram model"}
REWARD_WINDOW = 10
"""Steps over which the curve of the reward is averaged."""


def time_table(summary: dict[str, Any]) -> Table:
    """All stages with their time and speed, and the bits per byte of held-out text, for `rich`."""
    table = _table("stage", "tokens", "time", "tokens/s", "bits per byte")
    table.title = f"The demo took {summary['minutes']:.1f} minutes"
    for name, figures in summary["stages"].items():
        table.add_row(
            name,
            f"{figures['tokens']:,}" if "tokens" in figures else "",
            f"{figures['seconds']:.0f} s",
            f"{figures['tokens_per_second']:,}" if "tokens_per_second" in figures else "",
            " → ".join(f"{figures[bits]:.3f}" for bits in ("bpb_before", "bpb_after") if bits in figures),
        )
    table.add_section()
    for name, title in BASELINES.items():
        table.add_row(title, "", "", "", f"{summary['stages']['baselines'][name]:.3f}", style="dim")
    return table


def skills_table(summary: dict[str, Any]) -> Table:
    """Shares of held-out questions that are answered right after each stage, for `rich`."""
    table = _table("after", *SKILLS.values())
    table.title = "Right answers to held-out questions"
    for name, figures in summary["stages"].items():
        if SKILLS.keys() <= figures.keys():
            table.add_row(name, *(f"{figures[skill]:.1%}" for skill in SKILLS))
    return table


def _table(first: str, *columns: str) -> Table:
    from rich.table import Table

    table = Table(first)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def draw_curves(run: Demo) -> Metrics:
    """``curves.png``: held-out bits per byte, fine-tuning loss, reward and held-out pass@1 by step."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no curves: they need matplotlib (pip install 'lmchat[plot]')")
        return {}
    figure = Figure(figsize=(13, 3.6), layout="constrained")
    pretrain, sft, grpo = figure.subplots(1, 3)
    _curve(pretrain, run.logs("pretrain"), "val/bpb", "held-out text", marker="o")
    _titles(pretrain, "Pretraining", "bits per byte")
    _curve(sft, run.logs("sft"), "train/loss_ema", "training", linewidth=1)
    _titles(sft, "Fine-tuning", "loss on the assistant's tokens, nats")
    sft.set_yscale("log")
    _curve(grpo, run.logs("rl"), "train/pass@1", f"practised, mean of {REWARD_WINDOW} steps", window=REWARD_WINDOW)
    _curve(grpo, run.logs("rl"), "val/pass@1", "held-out problems", marker="o")
    _titles(grpo, "Reinforcement learning", "share of right answers (practised: full reward)")
    path = run.output / "curves.png"
    figure.savefig(path, dpi=120)
    print(f"The curves of the three trainings are in {path}")
    return {"curves": path.name}


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
