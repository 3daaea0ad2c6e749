"""Memory of reading parquet files with large pages."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lmchat import parquet_pages
from lmchat.data.parquet_text import read_documents
from lmchat.parquet_pages import rows_at_once
from lmchat.tasks.row_files import read_rows
from lmchat.types import UserError


def _rows(path: Path, texts: list[str], column: str | None = None, **options: Any) -> int:
    table = pa.table({"id": list(range(len(texts))), "nested": [[{"text": text[:9]}] for text in texts], "text": texts})
    pq.write_table(table, path, **options)
    with pq.ParquetFile(path) as file:
        return rows_at_once(path, file, column)


@pytest.mark.parametrize("compression", ["none", "zstd"])
@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_the_largest_page_decides(
    tmp_path: Path, compression: str, version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it is: after small pages, in a later row group, as a dictionary."""
    options: dict[str, Any] = {"compression": compression, "data_page_version": version, "data_page_size": 1000}
    random.seed(9)
    small = [f"{random.random()} " * 9 for _ in range(300)]
    large = random.randbytes(2_500_000).hex()
    path = tmp_path / "a.parquet"
    assert _rows(path, small, **options) == 16
    for texts in ([*small, large], [large, *small], [large, *[large] * 3]):
        for use_dictionary in (True, False):
            assert _rows(path, texts, use_dictionary=use_dictionary, row_group_size=170, **options) in range(2, 14)
            assert _rows(path, texts, "id", use_dictionary=use_dictionary, **options) == 16
    medium = ["".join(random.choices("ab ", k=3000)) for _ in range(9)]  # in statistics of the pages' headers
    assert _rows(path, [*medium, large], use_dictionary=False, **options) in range(2, 14)
    assert _rows(path, [large, *[large] * 3], row_group_size=170, **options) in range(2, 14)
    assert list(read_documents(path)) == [large] * 4
    assert read_rows(path)[3]["text"] == large  # type: ignore[index]
    monkeypatch.setattr(parquet_pages, "MAX_PAGE_BYTES", 4_900_000)
    for read in (read_rows, lambda path: next(read_documents(path))):
        with pytest.raises(UserError, match=r"^\S*a\.parquet has a page of (5|10|15|20) MB.*write .txt or [^;]*$"):
            read(path)
