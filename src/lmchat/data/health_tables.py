"""`DataHealth` as tables and as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lmchat.data.health import DataHealth, ShardHealth
from lmchat.files import replacing
from lmchat.types import UserError


def print_health(health: DataHealth) -> None:
    """Prints the tables to stdout; those without rows are left out."""
    console = Console(highlight=False)
    for table in (shard_table(health), evaluation_table(health), *document_tables(health)):
        if table.row_count:
            console.print(table)
    if not health.evaluation:
        console.print("No evaluation set compared; give some with --evaluation.")


def shard_table(health: DataHealth) -> Table:
    """One line per shard, their sum, and the shares of all documents."""
    names = ("documents", "characters", "empty", "exact duplicates", "near duplicates", "evaluation overlap")
    table = _table("Documents", "shard", *names)
    total = _counts(health.total)
    for number, shard in enumerate(health.shards):
        counts = (f"{count:,}" for count in _counts(shard))
        table.add_row(Path(shard.shard).stem, *counts, end_section=number == len(health.shards) - 1)
    table.add_row("all", *(f"{count:,}" for count in total))
    table.add_row("share", "", "", *(f"{count / max(total[0], 1):.2%}" for count in total[2:]))
    return table


def _counts(shard: ShardHealth) -> tuple[int, ...]:
    duplicates = (shard.exact_duplicates, shard.near_duplicates)
    return shard.documents, shard.characters, shard.empty, *duplicates, shard.overlapping


def evaluation_table(health: DataHealth) -> Table:
    """One line per evaluation set."""
    table = _table("Evaluation sets", "file", "examples", "with a 13-gram", "found in the data", "share")
    for each in health.evaluation:
        share = each["overlapping"] / max(each["checked"], 1)
        counts = (f"{each[name]:,}" for name in ("examples", "checked", "overlapping"))
        table.add_row(Text(Path(each["file"]).name), *counts, f"{share:.2%}")
    return table


def document_tables(health: DataHealth) -> list[Table]:
    """The longest and the most frequent documents."""
    tables = []
    for title, unit, documents in (
        ("Longest documents", "characters", health.longest),
        ("Most frequent documents", "copies", health.most_frequent),
    ):
        table = _table(title, "shard", "row", unit)
        table.add_column("beginning", no_wrap=True, overflow="ellipsis")
        for each in documents:
            beginning = " ".join(each["beginning"].split())
            table.add_row(Path(each["shard"]).stem, f"{each['row']:,}", f"{each[unit]:,}", Text(beginning))
        tables.append(table)
    return tables


def _table(title: str, name: str, *numbers: str) -> Table:
    table = Table(title=title, box=SIMPLE_HEAD)
    table.add_column(name, no_wrap=True)
    for number in numbers:
        table.add_column(number, justify="right")
    return table


def write_health(health: DataHealth, path: Path, **others: Any) -> None:
    """Writes the report as JSON. Raises `UserError` if the file cannot be written."""
    text = json.dumps({**health.as_json(), **others}, indent=1)
    try:
        with replacing(path) as unfinished:
            unfinished.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write the report {path} ({error.strerror}); choose another with --output") from error
    print(f"Report: {path}")
