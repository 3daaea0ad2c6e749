"""Any folder of text, JSON lines or parquet, made into shuffled parquet shards without duplicates.

Documents are ordered by a hash of the seed and their text: the order is random, does not depend on how the files are
named or listed, and brings equal documents together. Sorting goes through buckets on disk, so memory stays bounded.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import shutil
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq

from lmchat.data.parquet_text import TEXT_COLUMN, read_documents
from lmchat.files import new_folder
from lmchat.progress import ProgressBar
from lmchat.types import UserError

PLAIN_SUFFIXES = (".txt", ".md", ".rst")
SUFFIXES = (*PLAIN_SUFFIXES, ".jsonl", ".jsonl.gz", ".parquet")

_BUCKET_BYTES = 256 << 20
_MOST_BUCKETS = 256
_SPILL_BYTES = 1 << 20
_DIGEST_BYTES = 16
_SPILL_SCHEMA = pa.schema([("digest", pa.binary(_DIGEST_BYTES)), ("text", pa.large_string())])
_ROW_GROUP_DOCUMENTS = 1024
_ROW_GROUP_CHARACTERS = 1 << 26


@dataclass
class WrittenShards:
    """What `write_shards` wrote, and what it left out: duplicates, and texts of white space alone."""

    train_shards: int
    train_documents: int
    validation_documents: int
    characters: int
    duplicates: int
    blank: int


@dataclass
class ImportReport:
    """What `import_folder` wrote, and left out: files of other kinds, and plain text files that are not UTF-8."""

    shards: WrittenShards
    other_files: int
    undecodable: list[Path]


def import_folder(
    source: Path,
    output: Path,
    *,
    text_field: str = TEXT_COLUMN,
    separator: str | None = None,
    validation_fraction: float = 0.01,
    shard_characters: int = 250_000_000,
    seed: int = 0,
    progress: bool = True,
) -> ImportReport:
    """Make parquet shards from every .txt, .md, .rst, .jsonl, .jsonl.gz and .parquet file under a folder.

    A plain text file is one document, or several with a ``separator``. Hidden files are left out.

    Args:
        source: a folder, or one file.
        output: folder to make; see `write_shards` for this and the rest.
        text_field: field of JSON lines and column of parquet files that holds the text.
        separator: cuts plain text files into documents.
        progress: show a progress bar on stderr.

    Raises:
        UserError: nothing to import, a malformed line or file (named), or an output folder that is in use.
    """
    if output.resolve().is_relative_to(source.resolve()):
        raise UserError(f"the output folder {output} lies inside the source {source}; choose one outside of it")
    files, other_files = _find_files(source)
    source_bytes = sum(path.stat().st_size for path in files)
    with ProgressBar("Reading text", source_bytes, unit="B", enabled=progress) as bar:
        reader = _Reader(text_field, separator, bar)
        try:
            shards = write_shards(
                (text for path in files for text in reader.read(path)),
                output,
                validation_fraction=validation_fraction,
                shard_characters=shard_characters,
                seed=seed,
                expected_bytes=source_bytes,
            )
        except UserError as error:
            if not reader.undecodable:
                raise
            left_out = f"{len(reader.undecodable)} file(s) that are not UTF-8 text, such as {reader.undecodable[0]}"
            raise UserError(f"{error} (left out: {left_out})") from error
    return ImportReport(shards, other_files, reader.undecodable)


def _find_files(source: Path) -> tuple[list[Path], int]:
    """The files to read, and the number of others."""
    if not source.exists():
        raise UserError(f"nothing to import: {source} does not exist")
    found = [source] if source.is_file() else [path for path in sorted(source.rglob("*")) if path.is_file()]
    visible = [path for path in found if not any(part.startswith(".") for part in path.relative_to(source).parts)]
    files = [path for path in visible if path.name.lower().endswith(SUFFIXES)]
    if not files:
        raise UserError(f"nothing to import: {source} has no file of the kinds {' '.join(SUFFIXES)}")
    return files, len(visible) - len(files)


@dataclass
class _Reader:
    """The documents of a file of any kind."""

    text_field: str
    separator: str | None
    bar: ProgressBar
    undecodable: list[Path] = field(default_factory=list)

    def read(self, path: Path) -> Iterator[str]:
        suffix = path.suffix.lower()
        if suffix == ".parquet":
            yield from (text or "" for text in read_documents(path, self.text_field))
            self.bar.advance(path.stat().st_size)
            return
        read = self._read_plain if suffix in PLAIN_SUFFIXES else self._read_jsonl
        try:
            done = self.bar.done
            with path.open("rb") as file:
                for text in read(path, file):
                    yield text
                    self.bar.set(done + file.tell())
            self.bar.set(done + path.stat().st_size)
        except OSError as error:
            raise UserError(f"cannot read {path} ({error.strerror or error})") from error

    def _read_plain(self, path: Path, file: IO[bytes]) -> Iterator[str]:
        try:
            text = file.read().decode("utf-8-sig")
        except UnicodeDecodeError:
            text = "\0"
        if "\0" in text:
            self.undecodable.append(path)
        else:
            yield from text.split(self.separator) if self.separator else [text]

    def _read_jsonl(self, path: Path, file: IO[bytes]) -> Iterator[str]:
        lines: Iterable[bytes] = gzip.GzipFile(fileobj=file) if path.suffix.lower() == ".gz" else file
        number = 0
        try:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield self._text_of(line, f"{path}:{number}")
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise UserError(f"{path} is damaged after line {number} ({error}); fetch or make it anew") from error

    def _text_of(self, line: bytes, place: str) -> str:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{place} is not valid JSON ({error}); correct or remove the line") from error
        if not isinstance(record, dict) or self.text_field not in record:
            has = f"the fields {', '.join(record)}" if isinstance(record, dict) else f"a {type(record).__name__}"
            raise UserError(f"{place} has no field `{self.text_field}` but {has}; name the field with --text_field")
        text = record[self.text_field]
        if not isinstance(text, str | None):
            raise UserError(
                f"{place}: field `{self.text_field}` holds a {type(text).__name__}, not a string; "
                "name another field with --text_field"
            )
        return text or ""


def write_shards(
    documents: Iterable[str],
    output: Path,
    *,
    validation_fraction: float = 0.01,
    shard_characters: int = 250_000_000,
    seed: int = 0,
    expected_bytes: int = 0,
) -> WrittenShards:
    """Shuffle documents, drop exact duplicates and blank ones, and write ``shard_00000.parquet`` and so on.

    Args:
        output: folder to make; it appears when it is complete.
        validation_fraction: share of the documents that go to the last shard, which is never empty, nor are the others.
        shard_characters: a training shard with this many is full.
        seed: decides the order.
        expected_bytes: rough size of the text, which decides the number of buckets to sort in.

    Raises:
        UserError: fewer than two documents, or ``output`` holds something already.
    """
    if not 0 < validation_fraction < 1:
        raise UserError(f"validation_fraction is {validation_fraction}; it must be between 0 and 1, for example 0.01")
    if shard_characters < 1:
        raise UserError(f"shard_characters is {shard_characters}; it must be at least 1")
    if abs(seed) >= 2**63:
        raise UserError(f"seed is {seed}; it must be below 2^63 in size")
    with new_folder(output) as folder:
        spilled = folder / "spilled"
        spilled.mkdir()
        buckets = [spilled / f"{i}.arrow" for i in range(min(_MOST_BUCKETS, 1 + expected_bytes // _BUCKET_BYTES))]
        read, blank = _spill(documents, buckets, seed)
        unique = sum(map(_count_unique, buckets))
        if unique < 2:
            raise UserError(
                f"found {unique} document(s) with text, at least 2 are needed, as one is kept for validation; "
                "give more files, or cut a long one into documents with --separator"
            )
        validation = min(max(1, round(validation_fraction * unique)), unique - 1)
        ordered = (text for bucket in buckets for text in _read_in_order(bucket))
        with _ShardWriter(folder) as writer:
            for number, text in enumerate(ordered):
                full = number < unique - validation and writer.shard_characters >= shard_characters
                if number in (0, unique - validation) or full:
                    writer.start_shard()
                writer.add(text)
        shutil.rmtree(spilled)
    return WrittenShards(writer.shards - 1, unique - validation, validation, writer.characters, read - unique, blank)


def _spill(documents: Iterable[str], buckets: list[Path], seed: int) -> tuple[int, int]:
    """Deal documents to buckets by the leading bits of their digests; how many, and how many were blank."""
    key = str(seed).encode()
    read = blank = 0
    with contextlib.ExitStack() as stack:
        writers = [stack.enter_context(_SpillWriter(path)) for path in buckets]
        for text in documents:
            if not text.strip():
                blank += 1
                continue
            data = text.encode("utf-8", "replace")  # lone surrogates, which JSON may hold
            digest = hashlib.blake2b(data, digest_size=_DIGEST_BYTES, key=key).digest()
            writers[int.from_bytes(digest[:4], "big") * len(buckets) >> 32].add(digest, data)
            read += 1
    return read, blank


class _SpillWriter(contextlib.AbstractContextManager["_SpillWriter"]):
    """Digests and texts, appended to an Arrow file."""

    def __init__(self, path: Path) -> None:
        self._file = pa.ipc.new_stream(str(path), _SPILL_SCHEMA)
        self._rows: list[tuple[bytes, bytes]] = []
        self._bytes = 0

    def add(self, digest: bytes, text: bytes) -> None:
        self._rows.append((digest, text))
        self._bytes += len(text)
        if self._bytes > _SPILL_BYTES:
            self._flush()

    def _flush(self) -> None:
        digests = pa.array([digest for digest, _ in self._rows], _SPILL_SCHEMA.field("digest").type)
        texts = pa.array([text for _, text in self._rows], pa.large_binary()).cast(pa.large_string())
        self._file.write_batch(pa.record_batch([digests, texts], schema=_SPILL_SCHEMA))
        self._rows, self._bytes = [], 0

    def __exit__(self, *exception: object) -> None:
        self._flush()
        self._file.close()


def _open_spill(bucket: Path) -> pa.Table:
    with pa.memory_map(str(bucket)) as file:
        return pa.ipc.open_stream(file).read_all()


def _count_unique(bucket: Path) -> int:
    return len(set(_open_spill(bucket)["digest"].to_pylist()))


def _read_in_order(bucket: Path) -> list[str]:
    """The texts of a bucket in order of their digests, each once."""
    table = _open_spill(bucket)
    texts = dict(zip(table["digest"].to_pylist(), table["text"].to_pylist(), strict=True))
    return [texts[digest] for digest in sorted(texts)]


class _ShardWriter(contextlib.AbstractContextManager["_ShardWriter"]):
    """Texts to numbered parquet files of one column."""

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
