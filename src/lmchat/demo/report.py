"""The demo's report, and its tables on the terminal."""

from collections.abc import Iterator
from typing import Any

from rich.table import Table

from lmchat.demo.run import Demo, Metrics


def write_run_report(run: Demo) -> Metrics:
    """Writes ``report.html`` and ``report.md``: curves, metrics, samples and origin of each stage."""
    from lmchat.report.page import write_report
    from lmchat.report.runs import read_run

    path = run.output / "report.html"
    write_report([read_run(str(run.output))], path)
    print(f"Report: {path}")
    return {"report": path.name}


def result_tables(run: Demo, summary: dict[str, Any]) -> Iterator[Table]:
    """The report's tables of time and metrics, with the baselines of bits per byte."""
    from lmchat.report.runs import read_run
    from lmchat.report.summary import effort, final_metrics

    runs = [read_run(str(run.output))]
    for title, content in (("Training", effort(runs)), ("Final metrics", final_metrics(runs))):
        table = Table(title=title)
        table.add_column(content.header[0], no_wrap=True)
        for column in content.header[1:]:
            table.add_column(column, justify="right")
        for row in content.rows:
            table.add_row(*row)
        yield table
    for name in ("gzip", "xz", "ngram"):
        table.add_row(f"{name}, bits per byte", f"{summary['stages']['baselines'][f'{name}_bpb']:.4g}", style="dim")
