"""Shuffles documents, drops duplicates and writes parquet shards, in bounded memory.

Documents are sorted by a hash of seed and text: the order is random, does not depend on the order of the input, and
puts equal documents next to each other. SQLite sorts them on disk.
"""

import contextlib
import hashlib
import math
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from lmchat.data.parquet_text import TEXT_COLUMN
from lmchat.files import new_folder
from lmchat.option_checks import check_count
from lmchat.types import UserError, user_errors

_CACHE_KILOBYTES = 1 << 17
_ROW_GROUP_DOCUMENTS = 1024
_ROW_GROUP_CHARACTERS = 1 << 24
_SCHEMA = pa.schema([(TEXT_COLUMN, pa.string())])


@dataclass
class WrittenShards:
    """Statistics of `write_shards`; ``blank`` documents are empty or white space."""

    train_shards: int
    train_documents: int
    validation_documents: int
    characters: int
    duplicates: int
    blank: int


def write_shards(
    documents: Iterable[str],
    output: Path,
    *,
    validation_fraction: float = 0.01,
    shard_characters: int = 250_000_000,
    seed: int = 0,
) -> WrittenShards:
    """Shuffles documents, drops exact duplicates and blank ones, and writes ``shard_00000.parquet`` and so on.

    Args:
        output: folder to create; it appears when it is complete.
        validation_fraction: share of the documents in the last shard. No shard is empty.
        shard_characters: size of a training shard in characters.
        seed: seed of the order.

    Raises:
        UserError: an option is out of range, there are fewer than two documents, or ``output`` is not empty.
    """
    if not 0 < validation_fraction < 1:
        raise UserError(f"validation_fraction is {validation_fraction}; it must be between 0 and 1, for example 0.01")
    check_count("", 1, shard_characters=shard_characters)
    if abs(seed) >= 2**63:
        raise UserError(f"seed is {seed}; it must be below 2^63 in size")
    counts: Counter[str] = Counter()
    shards = characters = 0
    with (
        new_folder(output) as folder,
        user_errors(f"cannot sort the documents in {folder}", "make room, or choose another --output", sqlite3.Error),
        _sorted(folder / "documents.sqlite", _rows(documents, seed, counts)) as (unique, texts),
    ):
        if unique < 2:
            raise UserError(
                f"found {unique} document(s) with text, at least 2 are needed, as one is kept for validation; "
                "give more files, or cut a long one into documents with --separator"
            )
        validation = min(max(1, round(validation_fraction * unique)), unique - 1)
        for part, limit in ((islice(texts, unique - validation), shard_characters), (texts, math.inf)):
            for first in part:
                path = folder / f"shard_{shards:05d}.parquet"
                characters += _write_shard(path, chain([first], part), limit)
                shards += 1
    return WrittenShards(
        train_shards=shards - 1,
        train_documents=unique - validation,
        validation_documents=validation,
        characters=characters,
        duplicates=counts["documents"] - unique,
        blank=counts["blank"],
    )


def _rows(documents: Iterable[str], seed: int, counts: Counter[str]) -> Iterator[tuple[bytes, bytes]]:
    """Yields hash and UTF-8 of documents that are not blank, and counts both kinds."""
    for text in documents:
        if not text.strip():
            counts["blank"] += 1
            continue
        counts["documents"] += 1
        data = text.encode("utf-8", "replace")  # lone surrogates, which JSON may contain
        yield hashlib.blake2b(data, digest_size=16, key=str(seed).encode()).digest(), data


@contextlib.contextmanager
def _sorted(path: Path, rows: Iterable[tuple[bytes, bytes]]) -> Iterator[tuple[int, Iterator[str]]]:
    """Sorts documents in a temporary database; yields the number of different ones, and their texts in order."""
    with contextlib.closing(sqlite3.connect(path)) as database:
        for setting in ("journal_mode = OFF", "synchronous = OFF", f"cache_size = -{_CACHE_KILOBYTES}"):
            database.execute(f"PRAGMA {setting}")
        database.execute("CREATE TABLE documents (hash BLOB, text BLOB)")
        database.execute("CREATE UNIQUE INDEX by_hash ON documents (hash)")
        database.executemany("INSERT OR IGNORE INTO documents VALUES (?, ?)", rows)
        (unique,) = database.execute("SELECT count(*) FROM documents").fetchone()
        found = database.execute("SELECT text FROM documents INDEXED BY by_hash ORDER BY hash")
        yield unique, (data.decode() for (data,) in found)
    path.unlink()


def _write_shard(path: Path, texts: Iterator[str], max_characters: float) -> int:
    """Writes texts until they have ``max_characters``; returns the number of their characters."""
    characters = 0
    with pq.ParquetWriter(path, _SCHEMA, compression="zstd") as file:
        while characters < max_characters:
            group, limit = list[str](), min(max_characters, characters + _ROW_GROUP_CHARACTERS)
            for text in islice(texts, _ROW_GROUP_DOCUMENTS):
                group.append(text)
                characters += len(text)
                if characters >= limit:
                    break
            if not group:
                break
            file.write_table(pa.table({TEXT_COLUMN: group}, schema=_SCHEMA))
    return characters
