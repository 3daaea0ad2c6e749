"""Tasks made of rows: a hub data set, or a local copy of it as JSON lines or parquet."""

from __future__ import annotations

import bisect
import gzip
import json
import warnings
import zlib
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import numpy as np

from lmchat.paths import expand_user
from lmchat.tasks.base import Task
from lmchat.types import Conversation, UserError

REFERENCE_SHUFFLE_SEED = 42
"""Rows are taken in the order of ``numpy.random.default_rng(42).permutation``, as ``datasets`` shuffles them."""

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
REPORTED_ROWS = 5

T = TypeVar("T")


class MalformedRow(ValueError):
    """A row that is no example of its task. The message says what is wrong with it."""


def field(row: Any, name: str, kind: type[T]) -> T:
    """``row[name]``, checked to be there and to be of type ``kind``.

    Raises:
        MalformedRow: it is missing, of another type, or text that UTF-8 cannot hold.
    """
    if not isinstance(row, dict):
        raise MalformedRow(f"the row is {type(row).__name__}, not an object with fields")
    if name not in row:
        raise MalformedRow(f"field '{name}' is missing (there are: {', '.join(map(str, row)) or 'none'})")
    value = row[name]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise MalformedRow(f"field '{name}' is {type(value).__name__}, not {kind.__name__}")
    if isinstance(value, str):
        checked_text(value, f"field '{name}'")
    return value


def checked_text(text: Any, what: str) -> str:
    """``text``, checked to be a string that is not empty and that UTF-8 can hold."""
    if not isinstance(text, str):
        raise MalformedRow(f"{what} is {type(text).__name__}, not str")
    if not text:
        raise MalformedRow(f"{what} is empty")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise MalformedRow(f"{what} holds half a surrogate pair, which is no character") from None
    return text


class Rows(Protocol):
    """Rows that say where they come from."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any:
        """The row. Raises `MalformedRow` where it cannot be read."""

    def location(self, index: int) -> str:
        """File and line (or row) for error messages."""


class JSONLines:
    """The non-blank lines of a .jsonl or .jsonl.gz file, parsed when they are asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        opener = gzip.open if path.suffix == ".gz" else open
        try:
            with opener(path, "rb") as file:
                self.lines = [(number, line) for number, line in enumerate(file, 1) if line.strip()]
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"cannot read {path}: {error}; copy or download it again") from error

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index: int) -> Any:
        try:
            return json.loads(self.lines[index][1])
        except (ValueError, RecursionError) as error:
            raise MalformedRow(f"not JSON: {error}") from None

    def location(self, index: int) -> str:
        return f"{self.path}, line {self.lines[index][0]}"


class TableRows:
    """The rows of an Arrow table, which may be memory-mapped."""

    def __init__(self, table: Any, source: str) -> None:
        self.table = table
        self.source = source

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def __getitem__(self, index: int) -> Any:
        return self.table.slice(index, 1).to_pylist()[0]

    def location(self, index: int) -> str:
        return f"{self.source}, row {index}"


class ChainedRows:
    """Several sources one after the other."""

    def __init__(self, sources: Sequence[Rows]) -> None:
        self.sources = sources
        self.ends = list(accumulate(map(len, sources)))

    def _locate(self, index: int) -> tuple[Rows, int]:
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


def read_rows(path: str | Path, split: str | None = None) -> Rows:
    """Rows of a file, or of the data files of a folder in the order of their names.

    Args:
        path: a .jsonl, .jsonl.gz or .parquet file, or a folder of them.
        split: in a folder, only the files whose name is the split's, alone or followed by ``-`` or ``_``
            (``test.parquet``, ``train-00000-of-00004.parquet``). A file is taken as it is.
    """
    path = expand_user(path)
    if not path.exists():
        raise UserError(f"there is no file or folder {path}; give the path of a {', '.join(SUFFIXES)} file or folder")
    files = sorted(file for file in path.iterdir() if _matches(file, split)) if path.is_dir() else [path]
    if not files:
        wanted = " or ".join(f"{split or '*'}{suffix}" for suffix in SUFFIXES)
        raise UserError(f"folder {path} holds no {wanted}; give the path of the file itself or of another folder")
    return ChainedRows([_read_file(file) for file in files])


def _matches(file: Path, split: str | None) -> bool:
    if not file.name.endswith(SUFFIXES):
        return False
    stem = file.name.split(".")[0]
    return split is None or stem == split or stem.startswith((f"{split}-", f"{split}_"))


def _read_file(path: Path) -> Rows:
    if not path.name.endswith(SUFFIXES):
        raise UserError(f"{path} is none of {', '.join(SUFFIXES)}; convert it to JSON lines")
    if path.suffix != ".parquet":
        return JSONLines(path)
    import pyarrow.parquet as parquet

    try:
        return TableRows(parquet.read_table(path, memory_map=True), str(path))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}; copy or download it again") from error


@dataclass(frozen=True)
class HubDataset:
    """A data set of the Hugging Face hub, one configuration and split of it."""

    repository: str
    config: str | None
    split: str

    def __str__(self) -> str:
        return f"{self.repository} ({', '.join(filter(None, (self.config, self.split)))})"

    def rows(self) -> Rows:
        """Download it, unless it is in the cache of ``datasets``."""
        import datasets

        try:
            dataset = datasets.load_dataset(self.repository, self.config, split=self.split)
        except Exception as error:  # whatever the network, the hub or the cache comes up with
            raise UserError(
                f"cannot load {self} from the hub: {error}; check the network, or give a local copy as `path`"
            ) from error
        return TableRows(dataset.with_format("arrow")[:], str(self))


class RowTask(Task):
    """A task whose examples are the rows of a hub data set or of local files."""

    def __init__(
        self,
        hub: HubDataset | None,
        path: str | None,
        skip_malformed: bool = False,
        shuffle_seed: int | None = REFERENCE_SHUFFLE_SEED,
        **slice: Any,
    ) -> None:
        """Set where the rows come from.

        Args:
            hub: the data set to load where ``path`` is null.
            path: a local copy: a .jsonl, .jsonl.gz or .parquet file, or a folder of them named after their split.
            skip_malformed: leave malformed rows out with a warning that counts them, instead of refusing the data.
            shuffle_seed: order of the examples; null keeps the order of the rows.
            slice: see `Task`.
        """
        super().__init__(**slice)
        if shuffle_seed is not None and shuffle_seed < 0:
            raise UserError(f"{type(self).__name__}: shuffle_seed is {shuffle_seed}; use 0 or more, or null")
        self.hub = hub
        self.path = path
        self.skip_malformed = skip_malformed
        self.shuffle_seed = shuffle_seed

    @abstractmethod
    def conversation(self, row: Any) -> Conversation:
        """The row as a conversation. Raises `MalformedRow` where that is not possible."""

    @property
    def name(self) -> str:
        return f"{super().name}/{self.hub.split}" if self.hub else super().name

    @cached_property
    def rows(self) -> Rows:
        if self.path is not None:
            return read_rows(self.path, self.hub.split if self.hub else None)
        assert self.hub is not None
        return self.hub.rows()

    @cached_property
    def malformed(self) -> list[str]:
        """What is wrong with each malformed row, with its location."""
        return list(self._checked[1])

    @cached_property
    def _checked(self) -> tuple[np.ndarray, list[str]]:
        """Indices of the good rows, int64, and the complaints about the others."""
        good, complaints = [], []
        for index in range(len(self.rows)):
            try:
                self.conversation(self.rows[index])
                good.append(index)
            except MalformedRow as error:
                complaints.append(f"{self.rows.location(index)}: {error}")
        if complaints:
            self._report(complaints)
        if not good:
            raise UserError(f"{self.name}: {self.path or self.hub} holds no rows; give another path")
        return np.array(good, dtype=np.int64), complaints

    def _report(self, complaints: list[str]) -> None:
        listed = "\n  ".join(complaints[:REPORTED_ROWS] + ["..."] * (len(complaints) > REPORTED_ROWS))
        summary = f"{self.name}: {len(complaints)} of {len(self.rows)} rows are malformed:\n  {listed}"
        if not self.skip_malformed:
            raise UserError(f"{summary}\nMend them, or set `skip_malformed: true` to train without them")
        warnings.warn(f"skipped, {summary}", stacklevel=3)

    @cached_property
    def _order(self) -> np.ndarray:
        good = self._checked[0]
        if self.shuffle_seed is None:
            return good
        order = np.random.default_rng(self.shuffle_seed).permutation(len(self.rows))
        return order[np.isin(order, good)]  # a malformed row more or less leaves the order of the others

    def num_examples(self) -> int:
        return len(self._order)

    def example(self, index: int) -> Conversation:
        return self.conversation(self.rows[cast(int, self._order[index].item())])
