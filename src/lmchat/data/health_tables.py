"""`DataHealth` as tables and as JSON."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lmchat.data.health import DataHealth
from lmchat.files import write_json
from lmchat.types import user_errors

_SHOWN_CHARACTERS = 40  # fits into 80 columns
_HEADINGS = {
    "shard": "source", "millions": "million\ncharacters", "exact_duplicates": "exact\ncopies",
    "near_duplicates": "near\ncopies", "overlapping": "evaluation\n13-grams", "checked": "with\n13-grams",
    "found": "found\nin the data", "longer_than_a_row": "longer than\na row", "masked_rows": "masked\nrows",
}  # fmt: skip
"""Headings of columns that are not their key."""


def print_health(health: DataHealth) -> None:
    """Prints the tables to stdout; those without rows are left out."""
    console = Console(highlight=False)
    for table in _tables(health):
        if table.row_count:
            console.print(table)
    if not health.evaluation:
        console.print("No evaluation set compared; give some with --evaluation.")


def _tables(health: DataHealth) -> Iterator[Table]:
    shards = ({**asdict(each), "millions": f"{each.characters / 1e6:,.1f}"} for each in [*health.shards, health.total])
    keys = "shard documents millions empty exact_duplicates near_duplicates overlapping"
    yield _table("Documents", keys, shards)
    names = ({**each, "file": Path(each["file"]).name, "found": each["overlapping"]} for each in health.evaluation)
    yield _table("Evaluation sets", "file examples checked found share", names)
    for tokens in health.tokens:
        total, title = tokens["total"], f"Tokens in rows of {tokens['sequence_len']:,} ({tokens['name']})"
        parts = [*tokens["shards"], {"shard": "all", **total}, {"shard": "in training", **tokens["packed"]}]
        yield _table(title, "shard documents tokens longer_than_a_row cropped padded masked_rows", parts)
        lengths = (
            {"tokens": f"{int(start):,} to {2 * int(start) - 1:,}", "documents": n, "share": n / total["documents"]}
            for start, n in total["histogram"].items()
        )
        yield _table(f"Lengths ({tokens['name']})", "tokens documents share", lengths)
    yield _table("Longest documents", "shard row characters beginning", health.longest)
    yield _table("Most frequent documents", "shard row copies beginning", health.most_frequent)


def _table(title: str, keys: str, rows: Iterable[Mapping[str, Any]]) -> Table:
    table = Table(title=title, box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    first, *others = keys.split()
    table.add_column(_HEADINGS.get(first, first), overflow="fold")
    for key in others:
        if key == "beginning":
            table.add_column(key, no_wrap=True, overflow="ellipsis", max_width=_SHOWN_CHARACTERS)
        else:
            table.add_column(_HEADINGS.get(key, key), justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*(_cell(row.get(key)) for key in (first, *others)))
    return table


def _cell(value: Any) -> Text:
    if isinstance(value, float):
        return Text(f"{value:.2%}")
    if isinstance(value, int):
        return Text(f"{value:,}")
    # Control characters of the text must not reach the terminal.
    visible = "".join(character if character.isprintable() else " " for character in value or "")
    return Text(" ".join(visible.split()).removesuffix(".parquet"))


def write_health(health: DataHealth, path: Path) -> None:
    """Writes the report as JSON. Raises `UserError` if the file cannot be written."""
    with user_errors(f"cannot write the report {path}", "choose another with --output", OSError):
        write_json(path, {**asdict(health), "total": asdict(health.total)})
    print(f"Report: {path}")
