"""Reads rows of JSON lines, JSON arrays, CSV and parquet, compressed or not, from a file or a folder."""

from __future__ import annotations

import bisect
import codecs
import contextlib
import io
import json
import os
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from lmchat.parquet_pages import open_parquet, rows_at_once
from lmchat.paths import expand_user
from lmchat.progress import ProgressBar
from lmchat.records import (
    COMPRESSION_SUFFIXES,
    JSON_LINES_SUFFIXES,
    JSON_SUFFIXES,
    PARQUET_SUFFIX,
    TABLE_SUFFIXES,
    LongRecord,
    bounded_lines,
    find_files,
    json_values,
    kind_of,
    open_text,
    packed_as,
    table_rows,
)
from lmchat.types import UserError, user_errors

SUFFIXES = (*JSON_LINES_SUFFIXES, *JSON_SUFFIXES, *TABLE_SUFFIXES, PARQUET_SUFFIX)
"""Supported kinds of files; all but parquet may be compressed (`COMPRESSION_SUFFIXES`)."""

MAX_LINE_BYTES = 2**27
"""Limit of a line, which may be a whole array, so that no compressed file without line breaks fills the memory."""

_CHUNK_BYTES = 1 << 20
_KINDS = f"{', '.join(SUFFIXES)} (all but parquet also with {', '.join(COMPRESSION_SUFFIXES)})"


class MalformedRow(ValueError):
    """A row is not a valid example of its task. The message says why."""


def checked_text(text: Any, what: str) -> str:
    """Returns ``text`` after checking that it is a string that UTF-8 can encode."""
    if not isinstance(text, str):
        raise MalformedRow(f"{what} is {type(text).__name__}, not str")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise MalformedRow(f"{what} contains half a surrogate pair, which is not a character") from None
    return text


class _Places(NamedTuple):
    """Start of each row and the end in ``content``, which may be in ``folder``. A row is the rest of its line."""

    starts: array[int]
    content: Path
    folder: tempfile.TemporaryDirectory[str] | None
    unit: str


class _FileWithBar(io.FileIO):
    """A file whose reads move a progress bar."""

    def __init__(self, path: Path, bar: ProgressBar) -> None:
        super().__init__(path)
        self._bar = bar

    def readinto(self, buffer: Any) -> int | None:
        count = super().readinto(buffer)
        self._bar.set(self.tell())
        return count


class TextRows:
    """The non-blank lines of a JSON lines file, the values of another JSON file, or the rows of a table.

    Only their positions are in memory. Rows are parsed on access, from the file itself if they are lines of it, else
    from a temporary copy with one row per line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.notes: Sequence[str] = ()
        kind, compression = kind_of(path)
        if kind == PARQUET_SUFFIX:
            self._keep_rows(_parquet_rows(path), "row")
            return
        if not compression:
            _refuse_packed(path)
        with self._text() as (file, encoding):
            in_place = not compression and encoding == "utf-8" and kind not in TABLE_SUFFIXES
            if encoding != "utf-8":
                self.notes = [f"{path} is {encoding.upper()}"]
            if kind in TABLE_SUFFIXES:
                self._keep_rows(table_rows(file, str(path), None, MAX_LINE_BYTES), "row")
            elif not in_place:
                self._index(self._lines(file), "line", copied=True)
        if in_place:
            with self._raw() as raw:  # positions in the file, of which a byte order mark is a part
                self._index(self._lines(raw), "line", copied=False)
        if self._places.unit == "line" and len(self) and not self._is_by_line(kind):
            self._read_values(kind)

    def _lines(self, file: BinaryIO) -> Iterator[bytes]:
        try:
            yield from bounded_lines(file, str(self.path), MAX_LINE_BYTES)
        except LongRecord as error:
            raise UserError(f"{error}; save each row as one line") from error

    @contextlib.contextmanager
    def _raw(self) -> Iterator[BinaryIO]:
        with (
            ProgressBar(f"Reading {self.path.name}", self.path.stat().st_size, unit="B") as bar,
            io.BufferedReader(_FileWithBar(self.path, bar)) as raw,
        ):
            yield raw

    @contextlib.contextmanager
    def _text(self) -> Iterator[tuple[BinaryIO, str]]:
        readable = user_errors(f"cannot read {self.path}", "copy or download it again", OSError)
        with readable, self._raw() as raw, open_text(self.path, raw) as text:
            yield text

    def _index(self, lines: Iterable[bytes], unit: str, copied: bool) -> None:
        """Records where each row is. Each of ``lines`` is one row or blank."""
        starts, position = array("q"), 0
        folder = tempfile.TemporaryDirectory(prefix="lmchat-rows-") if copied else None
        content = Path(folder.name, "rows.jsonl") if folder else self.path
        with content.open("wb") if copied else contextlib.nullcontext() as copy:
            for line in lines:
                if copy is not None:
                    copy.write(line)
                if _row_of(line):
                    starts.append(position)
                position += len(line)
        starts.append(position)
        self._places = _Places(starts, content, folder, unit)

    def _keep_rows(self, rows: Iterable[Any], unit: str) -> None:
        lines = (json.dumps(row, default=_unlike_json).encode() + b"\n" for row in rows)
        self._index(lines, unit, copied=True)

    def _is_by_line(self, kind: str) -> bool:
        with contextlib.suppress(MalformedRow):
            self[0]
            return len(self) > 1 or (kind in JSON_LINES_SUFFIXES and not self._line(0).startswith(b"["))
        return False

    def _read_values(self, kind: str) -> None:
        """Reads an array of rows, one row, or several. Lines stay as they are if that fails or if each is a row."""
        by_line, lines = self._places, len(self)
        try:
            with self._text() as (file, _):
                self._keep_rows(json_values(file, str(self.path), MAX_LINE_BYTES), "element")
        except UserError:
            are_objects = len(self) > 1 and all(self._line(index).startswith(b"{") for index in range(len(self)))
            if not are_objects and kind not in JSON_LINES_SUFFIXES:
                raise
            return
        if len(self) and all(_is_message(self[index]) for index in range(len(self))):
            self._keep_rows([[self[index] for index in range(len(self))]], "element")
        if kind in JSON_LINES_SUFFIXES and len(self) == lines:
            self._places = by_line

    def _line(self, index: int) -> bytes:
        start, end = self._places.starts[index : index + 2]
        file = os.open(self._places.content, os.O_RDONLY)
        try:
            content = os.pread(file, min(end - start, MAX_LINE_BYTES), start)
        finally:
            os.close(file)
        return _row_of(content.partition(b"\n")[0])  # blank lines may follow

    def __len__(self) -> int:
        return len(self._places.starts) - 1

    def __getitem__(self, index: int) -> Any:
        try:
            return json.loads(self._line(index))
        except UnicodeDecodeError as error:
            raise MalformedRow(f"not UTF-8 ({error}): save the file as UTF-8") from None
        except (ValueError, RecursionError) as error:
            raise MalformedRow(f"not JSON: {error}") from None

    def location(self, index: int) -> str:
        number = self._line_number(index) if self._places.unit == "line" else index
        return f"{self.path}, {self._places.unit} {number}"

    def _line_number(self, index: int) -> int:
        """Number of a row's line, counted in the file, since only the rows of error messages need theirs."""
        start = self._places.starts[index]
        with self._places.content.open("rb") as file:
            chunks = iter(lambda: file.read(min(_CHUNK_BYTES, start - file.tell())), b"")
            return 1 + sum(chunk.count(b"\n") for chunk in chunks)


def _refuse_packed(path: Path) -> None:
    with path.open("rb") as file:
        found = packed_as(file.read(16))
    if found == ".zip":
        raise UserError(f"{path} contains a ZIP archive or a spreadsheet; unpack it, or save the table as CSV")
    if found == PARQUET_SUFFIX:
        raise UserError(f"{path} contains parquet; end its name in {found}")
    if found is not None:
        raise UserError(f"{path} contains {found} data; unpack it, or add {found} to its name")


def _row_of(line: bytes) -> bytes:
    return line.removeprefix(codecs.BOM_UTF8).strip().rstrip(b",")


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and bool(value.keys() & {"role", "from"})


def _parquet_rows(path: Path) -> Iterator[Any]:
    with (
        open_parquet(path) as file,
        ProgressBar(f"Reading {path.name}", file.metadata.num_rows, unit="rows") as bar,
    ):
        for batch in file.iter_batches(batch_size=rows_at_once(path, file)):
            yield from bar.track(batch.to_pylist())


def _unlike_json(value: Any) -> Any:
    """Marks a value of a table that is neither text nor number nor list, so that it is not taken for text."""
    return {type(value).__name__: str(value)}


@dataclass
class TableRows:
    """The rows of an Arrow table, which may be memory-mapped."""

    table: Any
    source: str
    notes: Sequence[str] = ()

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def __getitem__(self, index: int) -> Any:
        return self.table.slice(index, 1).to_pylist()[0]

    def location(self, index: int) -> str:
        return f"{self.source}, row {index}"


class ChainedRows:
    """Several files one after the other."""

    def __init__(self, sources: Sequence[TextRows], notes: Sequence[str] = ()) -> None:
        self.sources = sources
        self.ends = list(accumulate(map(len, sources)))
        self.notes = [*notes, *(note for source in sources for note in source.notes)]

    def _locate(self, index: int) -> tuple[TextRows, int]:
        source = bisect.bisect_right(self.ends, index)
        return self.sources[source], index - (self.ends[source - 1] if source else 0)

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> Any:
        rows, local = self._locate(index)
        return rows[local]

    def location(self, index: int) -> str:
        rows, local = self._locate(index)
        return rows.location(local)


Rows = TableRows | ChainedRows
"""A sequence of rows.

``notes`` are remarks on the files for the user, ``location`` gives a row's file and line for errors. Access to a row
raises `MalformedRow` if it cannot be read.
"""


def read_rows(path: str | Path, split: str | None = None) -> ChainedRows:
    """Reads the rows of a file, or of the data files of a folder in the order of their names.

    Args:
        path: a file with one of `SUFFIXES`, or a folder, whose hidden files are skipped.
        split: in a folder, read only files named after the split, such as ``test.parquet`` or
            ``train-00000-of-00004.parquet``; None reads all files, including subfolders. Ignored if ``path`` is a file.

    Raises:
        UserError: there is no such file, or it is damaged or of another kind.
    """
    path = expand_user(path)
    if not path.exists():
        raise UserError(f"there is no file or folder {path}; give the path of a {_KINDS} file or folder")
    if not path.is_dir() and not path.is_file():
        raise UserError(f"{path} is not a regular file; save its content to one")
    found = find_files(path, SUFFIXES)
    if path.is_file():
        if not found.files:
            raise UserError(f"{path} is not one of {_KINDS}; convert it to JSON lines")
        return ChainedRows([TextRows(path)])
    files = found.files if split is None else [file for file in found.files if _is_of(split, file, path)]
    hidden = f"hidden files and folders passed over: {found.hidden}"
    if not files:
        wanted = " or ".join(f"{split or '*'}{suffix}" for suffix in SUFFIXES)
        raise UserError(
            f"folder {path} contains no {wanted}{f' ({hidden})' if found.hidden else ''}; give the path of the file "
            "itself or of another folder"
        )
    notes = [f"{path}: {hidden}"] if found.hidden else []
    if split is None and found.others:
        notes.append(f"{path}: files of other kinds passed over: {found.other_kinds()}")
    if split is None and (links := found.broken_links):
        notes.append(f"{path}: {len(links)} link(s) that point nowhere passed over, such as {links[0].name}")
    return ChainedRows([TextRows(file) for file in files], notes)


def _is_of(split: str, file: Path, folder: Path) -> bool:
    stem = file.name.split(".")[0]
    return file.parent == folder and (stem == split or stem.startswith((f"{split}-", f"{split}_")))
