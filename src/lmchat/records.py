"""Finds and reads JSON lines, JSON arrays and CSV files, compressed or not, in UTF-8, UTF-16 or UTF-32.

Files are read as streams: memory is bounded by the longest record allowed.
"""

import bz2
import codecs
import contextlib
import csv
import gzip
import io
import json
import lzma
import os
import re
import zlib
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any, AnyStr, BinaryIO, cast

from lmchat.types import UserError

JSON_LINES_SUFFIXES = (".jsonl", ".ndjson")
JSON_SUFFIXES = (".json",)
TABLE_SUFFIXES = (".csv", ".tsv")
PARQUET_SUFFIX = ".parquet"
COMPRESSION_SUFFIXES = (".gz", ".zst", ".bz2", ".xz")

DAMAGE = (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError)
"""Errors of damaged compressed data."""

_BEGINNINGS = {
    ".gz": rb"\x1f\x8b",
    ".bz2": rb"BZh[1-9]",
    ".xz": rb"\xfd7zXZ\0|\x5d\0\0",
    ".zst": rb"\x28\xb5\x2f\xfd|[P-_]\x2aM\x18",
    PARQUET_SUFFIX: rb"PAR1",
    ".zip": rb"PK\x03\x04",
}

_CHUNK_BYTES = 1 << 20
_PROBE_BYTES = 4096
_BOMS = {  # UTF-32 first: its marks begin with those of UTF-16
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
    codecs.BOM_UTF8: "utf-8",
}
_XZ_MEMORY_BYTES = 300_000_000
"""Limit of a decompressor's memory; `xz -9` needs 65 MB, and a file may ask for 4 GB."""
_BETWEEN_VALUES = re.compile(r"[\s,]*")


class LongRecord(UserError):
    """A record is longer than the limit; the rest of its file cannot be read."""


def kind_of(path: Path) -> tuple[str, str]:
    """Lower-case suffixes of a file's kind and of its compression (or ``""``), e.g. ``(".jsonl", ".gz")``."""
    # Parts of Wikipedia's dumps are called enwiki-20260101-pages-articles1.xml-p1p41242.bz2.
    *_, before, last = ["", "", *(re.sub(r"^\.xml-p\d+p\d+$", ".xml", suffix.lower()) for suffix in path.suffixes)]
    return (before, last) if last in COMPRESSION_SUFFIXES else (last, "")


@dataclass
class FoundFiles:
    """What `find_files` found.

    Attributes:
        files: files to read, sorted by name.
        others: number of files of other kinds, by suffix.
        hidden: number of files and folders that begin with a dot; they are left out.
        broken_links: broken symbolic links.
    """

    files: list[Path] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)
    hidden: int = 0
    broken_links: list[Path] = field(default_factory=list)

    def other_kinds(self) -> str:
        """Numbers of the most frequent other kinds, such as ``3 .pdf, 1 .png``."""
        return ", ".join(f"{count} {kind}" for kind, count in self.others.most_common(10))


def find_files(source: Path, kinds: Collection[str]) -> FoundFiles:
    """Finds the files of some kinds, compressed or not, in a folder and its subfolders, or takes ``source`` itself.

    Links to folders are followed, each folder once.
    """
    found, files, visited = FoundFiles(), [] if source.is_dir() else [source], set()
    for root, folders, names in os.walk(source, followlinks=True):
        if (real := os.path.realpath(root)) in visited:
            folders.clear()
            continue
        visited.add(real)
        visible = {name for name in (*folders, *names) if not name.startswith(".")}
        found.hidden += len(folders) + len(names) - len(visible)
        folders[:] = sorted(visible.intersection(folders))
        files += [Path(root, name) for name in names if name in visible]
    for path in sorted(files):
        kind, compression = kind_of(path)
        if not path.exists():
            found.broken_links.append(path)
        elif not path.is_file():
            found.others["not a regular file"] += 1
        elif kind in kinds and not (kind == PARQUET_SUFFIX and compression):
            found.files.append(path)
        else:
            found.others[kind + compression or "without a suffix"] += 1
    return found


@contextlib.contextmanager
def open_text(path: Path, raw: BinaryIO, encoding: str | None = None) -> Iterator[tuple[BinaryIO, str]]:
    """Yields a file's content, decompressed and in UTF-8 without a byte order mark, and its encoding on disk.

    Without ``encoding``, content in no Unicode encoding passes through unchanged.

    Args:
        path: name of the file; its suffix determines the compression.
        raw: the open file; its position shows the progress.
        encoding: encoding on disk; default is the Unicode encoding that the first bytes show.

    Raises:
        UserError: the compressed data is damaged, or the compression is not supported.
    """
    try:
        content = io.BufferedReader(cast(Any, _decompressed(path, raw)), _CHUNK_BYTES)
        if encoding is None:
            bom, encoding = _encoding_of(content.peek(_PROBE_BYTES)[:_PROBE_BYTES])
            content.read(bom)
        if encoding == "utf-8":
            yield content, encoding
        else:
            yield io.BufferedReader(_Stream(_recoded(content, encoding)), _CHUNK_BYTES), encoding
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not valid {error.encoding} text ({error.reason}); save it as UTF-8") from error
    except DAMAGE as error:
        raise UserError(f"{path} is damaged ({error}); copy or create it again") from error


def packed_as(head: bytes) -> str | None:
    """Suffix of the compression or container that the first bytes of a file belong to; None for plain text."""
    return next((suffix for suffix, beginning in _BEGINNINGS.items() if re.match(beginning, head)), None)


def _decompressed(path: Path, raw: BinaryIO) -> Any:
    suffix = kind_of(path)[1]
    head = cast(Any, raw).peek(_PROBE_BYTES)[:_PROBE_BYTES] if suffix else b""
    if head and (found := packed_as(head)) != suffix:  # browsers decompress, and keep the name
        what = f"{found or 'no compressed'} data; copy it again, or "
        remedy = f"end its name in {found}" if found else f"remove {suffix} from its name"
        remedy = "unpack it" if found == ".zip" else remedy
        raise UserError(f"{path} is damaged or has a wrong name: it contains {what}{remedy}")
    if suffix == ".gz":
        return gzip.GzipFile(fileobj=raw)
    if suffix == ".bz2":
        return bz2.BZ2File(raw)
    if suffix == ".xz":
        return _Stream(_unpacked_xz(path, raw))
    if suffix == ".zst":
        import pyarrow as pa

        if not pa.Codec.is_available("zstd"):
            raise UserError(f"{path}: this pyarrow cannot read zstd; decompress the file with `zstd -d`")
        return pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), "zstd")
    return raw


def _encoding_of(head: bytes) -> tuple[int, str]:
    """Length of the byte order mark, and the encoding. Without a mark, zero bytes indicate UTF-16 or UTF-32."""
    for mark, encoding in _BOMS.items():
        if head.startswith(mark):
            return len(mark), encoding
    for first, second, encoding in ((3, 2, "utf-32-le"), (0, 1, "utf-32-be")):
        highest, planes = head[first::4], head[second::4]
        if len(head) >= 8 and not any(highest) and max(planes) <= 16 and _is_printed(head, encoding):
            return 0, encoding
    even, odd = head[0::2], head[1::2]
    for high, low, encoding in ((odd, even, "utf-16-le"), (even, odd, "utf-16-be")):
        # Spaces and line breaks have one in any script; all characters of Latin text do.
        zeros = high.count(0)
        enough = len(head) >= 4 and (zeros > len(high) / 2 or zeros >= max(4, len(high) / 50))
        if enough and low.count(0) < zeros / 3 and _is_printed(head, encoding):
            return 0, encoding
    return 0, "utf-8"


def _is_printed(head: bytes, encoding: str) -> bool:
    if sum(32 <= byte < 127 for byte in head) > 0.7 * len(head):  # ASCII with zero bytes
        return False
    text = head[: len(head) // 4 * 4].decode(encoding, "replace")
    return sum(character.isprintable() or character in "\r\n\t\f" for character in text) > 0.98 * len(text)


class _Stream(io.RawIOBase):
    """A readable stream of the bytes that an iterator yields."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            if (chunk := next(self._chunks, None)) is None:
                return 0
            self._ready = chunk
        size = min(len(buffer), len(self._ready))
        buffer[:size], self._ready = self._ready[:size], self._ready[size:]
        return size


def _unpacked_xz(path: Path, raw: BinaryIO) -> Iterator[bytes]:
    """Decompresses the streams of an xz file in bounded memory, unlike `lzma.LZMAFile`."""
    content = raw.read(_PROBE_BYTES)
    while True:
        stream = lzma.LZMADecompressor(memlimit=_XZ_MEMORY_BYTES)
        while not stream.eof:
            if stream.needs_input and not (content := content or raw.read(_PROBE_BYTES)):
                raise EOFError("it ends within its data")
            try:
                yield stream.decompress(content, _CHUNK_BYTES)
            except lzma.LZMAError as error:
                if "limit" not in str(error):
                    raise
                raise UserError(
                    f"{path} takes more than {_XZ_MEMORY_BYTES / 1e6:.0f} MB of memory to decompress; "
                    "compress it with `xz -9` or less"
                ) from error
            content = b""
        content = stream.unused_data.lstrip(b"\0")  # padding
        while not content and (more := raw.read(_PROBE_BYTES)):
            content = more.lstrip(b"\0")
        if not content:
            return


def _recoded(source: BinaryIO, encoding: str) -> Iterator[bytes]:
    """Recodes a stream to UTF-8."""
    chunks = iter(partial(source.read, _CHUNK_BYTES), b"")
    for text in codecs.iterdecode(chunks, encoding):
        yield text.encode("utf-8", "surrogatepass")


def json_values(file: BinaryIO, what: str, max_characters: int) -> Iterator[Any]:
    """Yields the elements of JSON arrays, or consecutive JSON values, with or without commas or line breaks between.

    Args:
        file: in UTF-8.
        what: name of the file for errors.
        max_characters: longest value.

    Raises:
        UserError: the content is not JSON.
        LongRecord: a value is longer than ``max_characters``.
    """
    text = io.TextIOWrapper(file, encoding="utf-8")
    decoder = json.JSONDecoder()
    buffer, position, number = "", 0, 0
    array: bool | None = None  # unknown so far
    ended = False
    while True:
        match = _BETWEEN_VALUES.match(buffer, position)
        position = match.end() if match else position
        if position < len(buffer):
            if array is None:
                array = buffer[position] == "["
                position += array
                continue
            if array and buffer[position] == "]":  # another array or value may follow
                array, position = None, position + 1
                continue
            try:
                value, end = decoder.raw_decode(buffer, position)
            except (ValueError, RecursionError) as error:
                if ended or isinstance(error, RecursionError):
                    raise UserError(f"{what}: value {number + 1} is not valid JSON ({error}); correct it") from error
                end = len(buffer)
            if end < len(buffer) or ended:
                number += 1
                yield value
                position = end
                continue
        elif ended:
            if array:
                raise UserError(f"{what} ends within its array, after value {number}; copy or create it again")
            return
        if len(buffer) - position > max_characters:
            raise LongRecord(f"{what}: value {number + 1} is longer than {max_characters:,} characters")
        # An unfinished value is parsed again from its start, so reads grow with it.
        buffer, position = buffer[position:], 0
        more = text.read(min(max(_CHUNK_BYTES, len(buffer)), max_characters + 1 - len(buffer)))
        buffer, ended = buffer + more, not more


def table_rows(file: BinaryIO, what: str, column: str | None, max_characters: int) -> Iterator[dict[str, str]]:
    """Yields the rows of a CSV file by column. The delimiter may be comma, semicolon, tab or bar.

    Args:
        file: in UTF-8; the first line names the columns.
        what: name of the file for errors.
        column: a required column; its delimiter is used. None requires none, and the commonest delimiter is used.
        max_characters: longest cell and line.

    Raises:
        UserError: there is no such column, or a row is malformed.
        LongRecord: a cell is longer than ``max_characters``.
    """
    text = io.TextIOWrapper(file, encoding="utf-8", newline="")
    source = bounded_lines(text, what, max_characters)
    header = next(source, None)
    if header is None:
        return
    headers = {delimiter: next(csv.reader([header], delimiter=delimiter), []) for delimiter in ",;\t|"}
    delimiter = max(headers, key=lambda delimiter: (column in headers[delimiter], len(headers[delimiter])))
    names = headers[delimiter]
    if column is not None and column not in names:
        raise UserError(
            f"{what} has no column `{column}` (its first line has: {', '.join(names) or 'nothing'}); name the column "
            "with --text_field"
        )
    before = csv.field_size_limit(max_characters)
    try:
        reader = csv.reader(source, delimiter=delimiter, strict=True)
        for row in reader:
            if row:
                yield dict(zip(names, row, strict=False))
    except csv.Error as error:
        problem = f"{what}, line {reader.line_num + 1}: {error}"
        raise (LongRecord if "field limit" in str(error) else UserError)(f"{problem}; correct the row") from error
    finally:
        csv.field_size_limit(before)


def bounded_lines(file: IO[AnyStr], what: str, max_length: int) -> Iterator[AnyStr]:
    """Yields the lines of a file; ``what`` is its name for errors.

    Raises:
        LongRecord: a line is longer than ``max_length`` bytes or characters.
    """
    while line := file.readline(max_length + 1):
        if len(line) > max_length:
            unit = "bytes" if isinstance(line, bytes) else "characters"
            raise LongRecord(f"{what} has a line longer than {max_length:,} {unit}")
        yield line
