"""Shuffles documents, drops duplicates and writes parquet shards, in bounded memory.

Documents are sorted by a hash of seed and text: the order is random, does not depend on the order of the input, and
puts equal documents next to each other. Sorting uses buckets on disk, each with a range of hashes.
"""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from lmchat.data.parquet_text import TEXT_COLUMN
from lmchat.files import new_folder
from lmchat.option_checks import check_count
from lmchat.types import UserError

BUCKET_BYTES = 256 << 20
"""Size of a bucket, which is sorted in memory."""

_MAX_BUCKETS = 256
_DOCUMENT_BYTES = 200  # memory of a document's hash
_SPILL_BYTES = 64 << 20
_MAX_SPILL_BYTES = 1 << 20
_SPLIT_INTO = 16
_DIGEST_BYTES = 16
_DIGESTS = 1 << 64  # buckets are ranges of the first 8 bytes
_SPILL_SCHEMA = pa.schema([("digest", pa.binary(_DIGEST_BYTES)), ("text", pa.large_string())])
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
    expected_bytes: int = 0,
) -> WrittenShards:
    """Shuffles documents, drops exact duplicates and blank ones, and writes ``shard_00000.parquet`` and so on.

    Args:
        documents: the texts.
        output: folder to create; it appears when it is complete.
        validation_fraction: share of the documents in the last shard. No shard is empty.
        shard_characters: size of a training shard in characters.
        seed: seed of the order.
        expected_bytes: approximate size of the text, for the initial number of buckets.

    Raises:
        UserError: an option is out of range, there are fewer than two documents, or ``output`` is not empty.
    """
    if not 0 < validation_fraction < 1:
        raise UserError(f"validation_fraction is {validation_fraction}; it must be between 0 and 1, for example 0.01")
    check_count("", 1, shard_characters=shard_characters)
    if abs(seed) >= 2**63:
        raise UserError(f"seed is {seed}; it must be below 2^63 in size")
    with new_folder(output) as folder:
        spilled = folder / "spilled"
        spilled.mkdir()
        with _Spill(spilled, min(_MAX_BUCKETS, 1 + expected_bytes // BUCKET_BYTES), seed) as spill:
            for text in documents:
                spill.add(text)
        buckets = [part for bucket in spill.buckets for part in bucket.divided()]
        unique = sum(len(bucket.unique()) for bucket in buckets)
        if unique < 2:
            raise UserError(
                f"found {unique} document(s) with text, at least 2 are needed, as one is kept for validation; "
                "give more files, or cut a long one into documents with --separator"
            )
        validation = min(max(1, round(validation_fraction * unique)), unique - 1)
        with _ShardWriter(folder) as writer:
            for number, text in enumerate(text for bucket in buckets for text in bucket.texts()):
                full = number < unique - validation and writer.shard_characters >= shard_characters
                if number in (0, unique - validation) or full:
                    writer.start_shard()
                writer.add(text)
        shutil.rmtree(spilled)
    return WrittenShards(
        train_shards=writer.shards - 1,
        train_documents=unique - validation,
        validation_documents=validation,
        characters=writer.characters,
        duplicates=spill.documents - unique,
        blank=spill.blank,
    )


@dataclass
class _Bucket:
    """Documents on disk whose hashes begin with ``first`` to ``end`` - 1; ``cost`` is their size in memory."""

    path: Path
    first: int
    end: int
    cost: int = 0

    def table(self) -> pa.Table:
        """All documents, memory-mapped."""
        with pa.memory_map(str(self.path)) as file:
            return pa.ipc.open_stream(file).read_all()

    def unique(self) -> dict[bytes, int]:
        """For each digest the row of one of its documents."""
        rows: dict[bytes, int] = {}
        start = 0
        for chunk in self.table()["digest"].chunks:
            for row, digest in enumerate(chunk.to_pylist(), start):
                rows.setdefault(digest, row)
            start += len(chunk)
        return rows

    def texts(self) -> Iterator[str]:
        """Yields the texts in the order of their digests, without duplicates."""
        texts = self.table()["text"]
        for _, row in sorted(self.unique().items()):
            yield texts[row].as_py()

    def divided(self) -> Iterator[_Bucket]:
        """Yields this bucket, or if it is too large for memory, smaller buckets of its documents in order of hashes."""
        if self.cost <= BUCKET_BYTES or self.end - self.first < _SPLIT_INTO:
            yield self
            return
        parts = _ranges(self.path.with_suffix(""), self.first, self.end, _SPLIT_INTO)
        # Not memory-mapped: the mapped pages of a large file would count as memory of this process.
        with _Writers(parts) as writers, pa.OSFile(str(self.path)) as file:
            for batch in pa.ipc.open_stream(file):
                for digest, text in zip(batch["digest"], batch["text"], strict=True):
                    writers.add(digest.as_py(), text.as_py().encode())
        self.path.unlink()
        for part in parts:
            # Copies of one document cannot be split up.
            yield from part.divided() if part.cost < self.cost else [part]


def _ranges(stem: Path, first: int, end: int, number: int) -> list[_Bucket]:
    """Creates buckets with equal ranges of hashes."""
    edges = [first + (end - first) * index // number for index in range(number + 1)]
    return [
        _Bucket(stem.with_name(f"{stem.name}-{index}.arrow"), edges[index], edges[index + 1]) for index in range(number)
    ]


class _Writers(contextlib.ExitStack):
    """Writes documents to their buckets."""

    def __init__(self, buckets: Sequence[_Bucket]) -> None:
        super().__init__()
        self.buckets = buckets
        spill_bytes = min(_MAX_SPILL_BYTES, _SPILL_BYTES // len(buckets))
        self._files = [self.enter_context(_BucketWriter(bucket.path, spill_bytes)) for bucket in buckets]
        self._firsts = [bucket.first for bucket in buckets]

    def add(self, digest: bytes, text: bytes) -> None:
        index = bisect.bisect_right(self._firsts, int.from_bytes(digest[:8], "big")) - 1
        self.buckets[index].cost += len(text) + _DOCUMENT_BYTES
        self._files[index].add(digest, text)


class _Spill(_Writers):
    """Hashes documents and writes them to buckets on disk; counts and leaves out blank ones."""

    def __init__(self, folder: Path, number: int, seed: int) -> None:
        super().__init__(_ranges(folder / "bucket", 0, _DIGESTS, number))
        self.documents = self.blank = 0
        self._key = str(seed).encode()

    def add(self, text: str) -> None:  # type: ignore[override]
        if not text.strip():
            self.blank += 1
            return
        data = text.encode("utf-8", "replace")  # lone surrogates, which JSON may hold
        super().add(hashlib.blake2b(data, digest_size=_DIGEST_BYTES, key=self._key).digest(), data)
        self.documents += 1


class _BucketWriter(contextlib.AbstractContextManager["_BucketWriter"]):
    """Appends digests and texts to an Arrow file."""

    def __init__(self, path: Path, spill_bytes: int) -> None:
        self._file = pa.ipc.new_stream(str(path), _SPILL_SCHEMA)
        self._rows: list[tuple[bytes, bytes]] = []
        self._bytes = 0
        self._spill_bytes = spill_bytes

    def add(self, digest: bytes, text: bytes) -> None:
        self._rows.append((digest, text))
        self._bytes += len(text) + _DOCUMENT_BYTES
        if self._bytes > self._spill_bytes:
            self._flush()

    def _flush(self) -> None:
        digests = pa.array([digest for digest, _ in self._rows], _SPILL_SCHEMA.field("digest").type)
        texts = pa.array([text for _, text in self._rows], pa.large_binary()).cast(pa.large_string())
        self._file.write_batch(pa.record_batch([digests, texts], schema=_SPILL_SCHEMA))
        self._rows, self._bytes = [], 0

    def __exit__(self, *exception: object) -> None:
        self._flush()
        self._file.close()


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
        self._finish_shard()
