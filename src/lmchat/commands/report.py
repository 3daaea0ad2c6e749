"""``lmchat report``: one page about one or more runs."""

from pathlib import Path

TAKES_LIST = True
"""The arguments before the first option are one list."""


def report(runs: list[str], output: Path | None = None) -> None:
    """Write a report of runs (lmchat report RUN [RUN ...]): report.html, which needs no network, and report.md.

    Args:
        runs: each is a tag in $LMCHAT_BASE_DIR, a base folder with one run, FOLDER/TAG, or the folder of a run's
            checkpoints; several are overlaid.
        output: the HTML file; default is report.html in the current folder. report.md is written beside it.
    """
    from lmchat.report.page import write_report
    from lmchat.report.runs import read_runs

    output = output or Path("report.html")
    output = output if output.suffix else output.with_suffix(".html")
    write_report(read_runs(runs), output)
    print(f"{output} and {output.with_suffix('.md').name}: {', '.join(runs)}")


COMMANDS = report
