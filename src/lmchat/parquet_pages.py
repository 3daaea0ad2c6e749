"""Opens parquet files, and bounds the memory of reading them, since their pages are decoded as a whole.

A page may be one large document, or the dictionary of a column in which a document repeats: a file of some kB may
contain gigabytes. pyarrow does not tell the sizes of pages, so their headers are read here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from lmchat.types import UserError, user_errors

if TYPE_CHECKING:
    import pyarrow.parquet as pq

MAX_PAGE_BYTES = 150_000_000
"""Limit of a page. DuckDB writes pages of up to 100 MB, others of about 1 MB; reading one takes five times its size."""
MAX_ROWS = 16
"""Rows to decode at a time, of small ones."""

_BATCH_BYTES = 1 << 26
_HEADER_BYTES = 1 << 12, 1 << 24
"""Bytes to read of a page header, and at most; statistics in it may hold the least and the largest document."""
_SIZE, _COMPRESSED_SIZE = 2, 3
"""Fields of a page header, see https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift."""


@contextlib.contextmanager
def open_parquet(path: Path) -> Iterator[pq.ParquetFile]:
    """Opens a parquet file. Raises `UserError` if it is damaged, also for errors of reading it in the block."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    damaged = f"cannot read {path}, truncated or not a parquet file"
    large = f"{path} has too large documents for the free memory"
    remedy = "a page, so a document, is read as a whole: write .txt or .jsonl files, which are read in parts"
    with (
        user_errors(damaged, "download or create it again", pa.ArrowException, OSError, UnicodeDecodeError),
        user_errors(large, remedy, MemoryError),
        pq.ParquetFile(path) as file,
    ):
        yield file


def rows_at_once(path: Path, file: pq.ParquetFile, column: str | None = None) -> int:
    """The number of rows to decode at a time, given the pages of a column (default: of all).

    Raises:
        UserError: a page is too large.
    """
    largest = 0
    with path.open("rb") as raw:
        for group in map(file.metadata.row_group, range(file.metadata.num_row_groups)):
            for chunk in map(group.column, range(group.num_columns)):
                if column is None or chunk.path_in_schema == column:
                    start = min(filter(None, (chunk.dictionary_page_offset, chunk.data_page_offset)), default=0)
                    largest = max(largest, _largest_page(raw, start, start + chunk.total_compressed_size))
    if largest > MAX_PAGE_BYTES:
        raise UserError(
            f"{path} has a page of {largest / 1e6:,.0f} MB, of a large document or many; pages may have up to "
            f"{MAX_PAGE_BYTES / 1e6:.0f} MB: write .txt or .jsonl files, which are read in parts, or smaller pages"
        )
    return max(1, min(MAX_ROWS, _BATCH_BYTES // max(1, largest)))


def _largest_page(raw: BinaryIO, position: int, end: int) -> int:
    """Size of the largest page, uncompressed, up to the first header that is malformed, which pyarrow reports."""
    largest = 0
    while position < end:
        try:
            fields, length = _header(raw, position)
        except (IndexError, ValueError):
            break
        largest = max(largest, fields.get(_SIZE, 0))
        position += length + max(0, fields.get(_COMPRESSED_SIZE, 0))
    return largest


def _header(raw: BinaryIO, position: int) -> tuple[dict[int, int], int]:
    """The numbers of the page header at ``position``, and its length."""
    for size in _HEADER_BYTES:
        raw.seek(position)
        with contextlib.suppress(IndexError):
            return _struct(raw.read(size), 0)
    raise IndexError("the header does not end")


def _struct(data: bytes, at: int) -> tuple[dict[int, int], int]:
    """The numbers among the fields of a struct in Thrift's compact protocol, and its end. Structs in it are skipped."""
    fields, number = dict[int, int](), 0
    while head := data[at]:
        at, kind = at + 1, head & 15
        if not head >> 4:
            raise ValueError("a page header has no field numbers this large")
        number += head >> 4
        if kind in (4, 5, 6):
            value, at = _varint(data, at)
            fields[number] = value >> 1 ^ -(value & 1)
        elif kind == 8:
            length, at = _varint(data, at)
            at += length
        elif kind == 12:
            _, at = _struct(data, at)
        elif kind not in (1, 2):  # booleans have no content
            raise ValueError("a page header has no fields of this kind")
    return fields, at + 1


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value, shift = 0, 0
    while True:
        value |= (data[at] & 127) << shift
        at, shift = at + 1, shift + 7
        if data[at - 1] < 128:
            return value, at
