"""`DataHealth` as tables and as JSON."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lmchat.data.health import DataHealth, ShardHealth
from lmchat.files import write_json
from lmchat.types import user_errors

_SHOWN_CHARACTERS = 40  # fits into 80 columns


def print_health(health: DataHealth) -> None:
    """Prints the tables to stdout; those without rows are left out."""
    console = Console(highlight=False)
    for table in (shard_table(health), evaluation_table(health), *token_tables(health), *document_tables(health)):
        if table.row_count:
            console.print(table)
    if not health.evaluation:
        console.print("No evaluation set compared; give some with --evaluation.")


def shard_table(health: DataHealth) -> Table:
    """One line per shard, their sum, and the shares of all documents."""
    duplicates = ("exact\ncopies", "near\ncopies")
    names = ("documents", "million\ncharacters", "empty", *duplicates, "evaluation\n13-grams")
    table = _table("Documents", "source", *names)
    for number, shard in enumerate(health.shards):
        table.add_row(_name(shard.shard), *_cells(shard), end_section=number == len(health.shards) - 1)
    table.add_row("all", *_cells(health.total))
    return table


def _cells(shard: ShardHealth) -> list[str]:
    counts = (shard.empty, shard.exact_duplicates, shard.near_duplicates, shard.overlapping)
    return [f"{shard.documents:,}", f"{shard.characters / 1e6:,.1f}", *(f"{count:,}" for count in counts)]


def evaluation_table(health: DataHealth) -> Table:
    """One line per evaluation set."""
    table = _table("Evaluation sets", "file", "examples", "with\n13-grams", "found\nin the data", "share")
    for each in health.evaluation:
        share = each["overlapping"] / max(each["checked"], 1)
        counts = (f"{each[name]:,}" for name in ("examples", "checked", "overlapping"))
        table.add_row(Text(Path(each["file"]).name), *counts, f"{share:.2%}")
    return table


def token_tables(health: DataHealth) -> list[Table]:
    """For each tokenizer or mixture the lengths of documents and what packing does to them, and the histogram."""
    tables = []
    for each in health.tokens:
        title = f"Tokens in rows of {each['sequence_len']:,} ({each['name']})"
        packed = ("cropped", "padded", "masked\nrows")
        table = _table(title, "source", "documents", "tokens", "longer than\na row", *packed)
        for part in [*each["shards"], {"shard": "all", **each["total"]}, {"shard": "in training", **each["packed"]}]:
            counts = [_cell(part, key, ",") for key in ("documents", "tokens", "longer_than_a_row")]
            shares = [_cell(part, key, ".2%") for key in ("cropped", "padded")]
            table.add_row(_name(part["shard"]), *counts, *shares, _cell(part, "masked_rows", ","))
        lengths = _table(f"Lengths ({each['name']})", "tokens", "documents", "share")
        for start, count in each["total"]["histogram"].items():
            share = count / each["total"]["documents"]
            lengths.add_row(f"{int(start):,} to {2 * int(start) - 1:,}", f"{count:,}", f"{share:.2%}")
        tables += [table, lengths]
    return tables


def _name(shard: str) -> str:
    return shard.removesuffix(".parquet")


def _cell(numbers: dict[str, Any], key: str, form: str) -> str:
    return format(numbers[key], form) if key in numbers else ""


def document_tables(health: DataHealth) -> list[Table]:
    """The longest and the most frequent documents."""
    tables = []
    for title, unit, documents in (
        ("Longest documents", "characters", health.longest),
        ("Most frequent documents", "copies", health.most_frequent),
    ):
        table = _table(title, "source", "row", unit)
        table.add_column("beginning", no_wrap=True, overflow="ellipsis")
        for each in documents:
            # Control characters of the text must not reach the terminal.
            visible = "".join(character if character.isprintable() else " " for character in each["beginning"])
            beginning = " ".join(visible.split())[:_SHOWN_CHARACTERS]
            table.add_row(_name(each["shard"]), f"{each['row']:,}", f"{each[unit]:,}", Text(beginning))
        tables.append(table)
    return tables


def _table(title: str, name: str, *numbers: str) -> Table:
    table = Table(title=title, box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column(name, overflow="fold")
    for number in numbers:
        table.add_column(number, justify="right", no_wrap=True)
    return table


def write_health(health: DataHealth, path: Path) -> None:
    """Writes the report as JSON. Raises `UserError` if the file cannot be written."""
    with user_errors(f"cannot write the report {path}", "choose another with --output", OSError):
        write_json(path, {**asdict(health), "total": asdict(health.total)})
    print(f"Report: {path}")
