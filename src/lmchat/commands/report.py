"""``lmchat report``: what a run was and what came out of it, on one page."""

from __future__ import annotations

from pathlib import Path

TAKES_LIST = True
"""The arguments before the first option are one list."""


def report(runs: list[str], output: Path | None = None) -> None:
    """Write a report of one run or of several, overlaid: report.html, which needs no network, and report.md.

    lmchat report RUN [RUN ...] [--output FILE]

    Args:
        runs: each a tag in $LMCHAT_BASE_DIR, a base folder with one run, or FOLDER/TAG.
        output: the HTML file; default is report.html in the current folder. The Markdown goes beside it.
    """
    from lmchat.report.page import write_report
    from lmchat.report.runs import read_runs

    output = output or Path("report.html")
    write_report(read_runs(runs), output)
    print(f"{output} and {output.with_suffix('.md').name}: {', '.join(runs)}")


COMMANDS = report
