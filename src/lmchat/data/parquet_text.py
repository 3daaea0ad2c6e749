"""Lists parquet shards of text and reads their documents."""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from lmchat.parquet_pages import open_parquet, rows_at_once
from lmchat.types import UserError

TEXT_COLUMN = "text"
_NAME_COLUMN = "`lmchat data import FOLDER --text_field COLUMN` makes shards from another column"


def list_shards(data_dir: Path) -> list[Path]:
    """The parquet files of a folder sorted by name; the last one is for validation, the others for training.

    Raises:
        UserError: the folder is missing, has fewer than two shards, or a broken link.
    """
    if not data_dir.is_dir():
        raise UserError(
            f"there is no data folder {data_dir}; run `lmchat data download`, or import your own text with "
            "`lmchat data import`"
        )
    shards = sorted(data_dir.glob("*.parquet"))
    if len(shards) < 2:
        found = f"only {shards[0].name}" if shards else "no .parquet file"
        raise UserError(
            f"the data folder {data_dir} has {found}; at least two shards are needed (the last by name is the "
            "validation set): `lmchat data download` fetches them, `lmchat data import` makes them from any text"
        )
    for shard in shards:
        if not shard.exists():
            raise UserError(
                f"{shard} is a link to {shard.readlink()}, which is missing; restore it or download it again"
            )
    return shards


def check_text_column(parquet: pq.ParquetFile, path: Path, column: str = TEXT_COLUMN) -> None:
    """Raises `UserError` unless the file has a string column of this name."""
    schema = parquet.schema_arrow
    if schema.names.count(column) > 1:
        raise UserError(f"{path} has several columns `{column}`; {_NAME_COLUMN}")
    if column not in schema.names:
        raise UserError(
            f"{path} has no column `{column}` (it has: {', '.join(schema.names) or 'none'}); {_NAME_COLUMN}"
        )
    kind = schema.field(column).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise UserError(f"column `{column}` of {path} contains {kind}, not strings; {_NAME_COLUMN}")


def count_documents(path: Path) -> int:
    """Number of rows of a shard. Raises `UserError` if it has no text."""
    with open_parquet(path) as parquet:
        check_text_column(parquet, path)
        return int(parquet.metadata.num_rows)


def read_documents(path: Path, column: str = TEXT_COLUMN) -> Iterator[str | None]:
    """Yields the texts of a shard in order, None for null. Raises `UserError` if the file cannot be read."""
    with open_parquet(path) as parquet:
        check_text_column(parquet, path, column)
        for batch in parquet.iter_batches(batch_size=rows_at_once(path, parquet, column), columns=[column]):
            yield from batch.column(0).to_pylist()
