"""Small corpora for the tests of the data path."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest


@pytest.fixture
def write_shards(tmp_path: Path) -> Callable[..., Path]:
    """Writes lists of texts as shard_00000.parquet and so on into a folder, which it returns."""

    def write(*shards: Sequence[str | None], column: str = "text") -> Path:
        folder = tmp_path / "data"
        folder.mkdir(exist_ok=True)
        for number, texts in enumerate(shards):
            table = pa.table({column: pa.array(texts, pa.string())})
            pq.write_table(table, folder / f"shard_{number:05d}.parquet", row_group_size=3)
        return folder

    return write
