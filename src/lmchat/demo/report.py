"""The demo's tables, and its report."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lmchat.demo.run import Demo, Metrics

if TYPE_CHECKING:
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


def write_run_report(run: Demo) -> Metrics:
    """Writes ``report.html`` and ``report.md``: curves, metrics, samples and origin of each stage."""
    from lmchat.report.page import write_report
    from lmchat.report.runs import read_run

    path = run.output / "report.html"
    write_report([read_run(str(run.output))], path)
    print(f"Report: {path}")
    return {"report": path.name}
