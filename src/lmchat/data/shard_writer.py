"""Shuffles documents, drops duplicates and writes parquet shards, in bounded memory.

Documents are sorted by a hash of seed and text: the order is random, does not depend on the order of the input, and
puts equal documents next to each other. SQLite sorts them on disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import sqlite3
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from lmchat.data.parquet_text import TEXT_COLUMN
from lmchat.files import new_folder
from lmchat.option_checks import check_count
from lmchat.types import UserError

_CACHE_KILOBYTES = 1 << 17
_ROW_GROUP_DOCUMENTS = 1024
_ROW_GROUP_CHARACTERS = 1 << 24


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
    with new_folder(output) as folder, _database_errors(folder), _Sorter(folder / "documents.sqlite", seed) as sorter:
        unique = sorter.add(documents)
        if unique < 2:
            raise UserError(
                f"found {unique} document(s) with text, at least 2 are needed, as one is kept for validation; "
                "give more files, or cut a long one into documents with --separator"
            )
        validation = min(max(1, round(validation_fraction * unique)), unique - 1)
        with _ShardWriter(folder) as writer:
            for number, text in enumerate(sorter):
                full = number < unique - validation and writer.shard_characters >= shard_characters
                if number in (0, unique - validation) or full:
                    writer.start_shard()
                writer.add(text)
    return WrittenShards(
        train_shards=writer.shards - 1,
        train_documents=unique - validation,
        validation_documents=validation,
        characters=writer.characters,
        duplicates=sorter.documents - unique,
        blank=sorter.blank,
    )


@contextlib.contextmanager
def _database_errors(folder: Path) -> Iterator[None]:
    """Reports errors of the temporary database, such as those of a full disk, as `UserError`."""
    try:
        yield
    except sqlite3.Error as error:
        raise UserError(
            f"cannot sort the documents in {folder} ({error}); make room, or choose another --output"
        ) from error


class _Sorter(contextlib.ExitStack):
    """Sorts documents by their hashes in a temporary database, without duplicates and blank ones, which are counted."""

    def __init__(self, path: Path, seed: int) -> None:
        super().__init__()
        self.documents = self.blank = 0
        self._key = str(seed).encode()
        self.callback(path.unlink)
        self._database = self.enter_context(contextlib.closing(sqlite3.connect(path)))
        for setting in ("journal_mode = OFF", "synchronous = OFF", f"cache_size = -{_CACHE_KILOBYTES}"):
            self._database.execute(f"PRAGMA {setting}")
        self._database.execute("CREATE TABLE documents (hash BLOB, text BLOB)")
        self._database.execute("CREATE UNIQUE INDEX by_hash ON documents (hash)")

    def add(self, documents: Iterable[str]) -> int:
        """Adds documents; returns the number of different ones."""
        self._database.executemany("INSERT OR IGNORE INTO documents VALUES (?, ?)", self._rows(documents))
        return int(self._database.execute("SELECT count(*) FROM documents").fetchone()[0])

    def _rows(self, documents: Iterable[str]) -> Iterator[tuple[bytes, bytes]]:
        for text in documents:
            if not text.strip():
                self.blank += 1
                continue
            self.documents += 1
            data = text.encode("utf-8", "replace")  # lone surrogates, which JSON may contain
            yield hashlib.blake2b(data, digest_size=16, key=self._key).digest(), data

    def __iter__(self) -> Iterator[str]:
        for (data,) in self._database.execute("SELECT text FROM documents INDEXED BY by_hash ORDER BY hash"):
            yield data.decode()


class _ShardWriter(contextlib.AbstractContextManager["_ShardWriter"]):
    """Writes texts to numbered parquet files of one column."""

    def __init__(self, folder: Path) -> None:
        self.shards = self.characters = self.shard_characters = 0
        self._folder = folder
        self._schema = pa.schema([(TEXT_COLUMN, pa.string())])
        self._file: pq.ParquetWriter | None = None
        self._group: list[str] = []
        self._group_characters = 0

    def start_shard(self) -> None:
        self._finish_shard()
        path = self._folder / f"shard_{self.shards:05d}.parquet"
        self._file = pq.ParquetWriter(path, self._schema, compression="zstd")
        self.shards += 1
        self.shard_characters = 0

    def add(self, text: str) -> None:
        self._group.append(text)
        self._group_characters += len(text)
        self.shard_characters += len(text)
        self.characters += len(text)
        if len(self._group) == _ROW_GROUP_DOCUMENTS or self._group_characters >= _ROW_GROUP_CHARACTERS:
            self._flush()

    def _flush(self) -> None:
        assert self._file is not None
        self._file.write_table(pa.table({TEXT_COLUMN: self._group}, schema=self._schema))
        self._group, self._group_characters = [], 0

    def _finish_shard(self) -> None:
        if self._file is not None:
            if self._group:
                self._flush()
            self._file.close()
            self._file = None

    def __exit__(self, *exception: object) -> None:
        if exception == (None, None, None):
            self._finish_shard()
