"""Tasks made of rows: a Hugging Face Hub dataset, or a local copy as JSON lines or parquet."""

import warnings
from abc import abstractmethod
from array import array
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np

from lmchat.hub import Session, file_sizes
from lmchat.progress import ProgressBar
from lmchat.tasks.base import Task
from lmchat.tasks.row_files import MalformedRow, Rows, TableRows, checked_text, read_rows
from lmchat.types import Conversation, UserError, user_errors

REFERENCE_SHUFFLE_SEED = 42
"""Seed of ``numpy.random.default_rng(seed).permutation``, the order in which ``datasets`` shuffles rows."""

REPORTED_ROWS = 5

T = TypeVar("T")


def field(row: Any, name: str, kind: type[T]) -> T:
    """Returns ``row[name]`` after checking that it exists and is of type ``kind``.

    Raises:
        MalformedRow: it is missing, of another type, or text that UTF-8 cannot encode.
    """
    if not isinstance(row, dict):
        raise MalformedRow(f"the row is {type(row).__name__}, not an object with fields")
    if name not in row:
        raise MalformedRow(f"field '{name}' is missing (there are: {', '.join(map(str, row)) or 'none'})")
    value = row[name]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise MalformedRow(f"field '{name}' is {type(value).__name__}, not {kind.__name__}")
    if isinstance(value, str):
        nonempty_text(value, f"field '{name}'")
    return value


def nonempty_text(text: Any, what: str) -> str:
    """`checked_text` that also refuses an empty string."""
    if text == "":
        raise MalformedRow(f"{what} is empty")
    return checked_text(text, what)


@dataclass(frozen=True)
class HubDataset:
    """One configuration and split of a dataset on the Hugging Face Hub."""

    repository: str
    config: str | None
    split: str

    def __str__(self) -> str:
        return f"{self.repository} ({', '.join(filter(None, (self.config, self.split)))})"

    def rows(self) -> Rows:
        """Downloads it, unless it is in the cache of ``datasets``."""
        import datasets
        from huggingface_hub.constants import HF_HUB_CACHE

        session = Session(str(self))
        # Errors of the network, the Hub or the cache are of many types.
        remedy = "check the network, or give a local copy as `path`"
        with user_errors(f"cannot load {self} from the Hub", remedy, Exception):
            builder = session.list_files(lambda _: datasets.load_dataset_builder(self.repository, self.config))
            fetched = Path(HF_HUB_CACHE, f"datasets--{self.repository.replace('/', '--')}")
            folders = fetched, Path(builder.cache_dir).parent
            session.download([builder.download_and_prepare], lambda: sum(file_sizes(*folders)))
            dataset = builder.as_dataset(split=self.split)
        return TableRows(dataset.with_format("arrow")[:], str(self))


class RowTask(Task):
    """A task whose examples are the rows of a Hub dataset or of local files.

    Args:
        hub: the dataset to load if ``path`` is null.
        path: a local copy: a file of JSON lines, a JSON array or parquet (.jsonl, .ndjson, .json, each also .gz or
            .zst, or .parquet), or a folder of such files named after their split.
        skip_malformed: leave out malformed rows with a warning, instead of raising an error.
        shuffle_seed: seed of the order of the examples; null keeps the order of the rows.
        slice: see `Task`.
    """

    def __init__(
        self,
        hub: HubDataset | None,
        path: str | None = None,
        skip_malformed: bool = False,
        shuffle_seed: int | None = REFERENCE_SHUFFLE_SEED,
        **slice: Any,
    ) -> None:
        super().__init__(**slice)
        if shuffle_seed is not None and shuffle_seed < 0:
            raise UserError(f"{type(self).__name__}: shuffle_seed is {shuffle_seed}; use 0 or more, or null")
        self.hub = hub
        self.path = path
        self.skip_malformed = skip_malformed
        self.shuffle_seed = shuffle_seed

    @abstractmethod
    def conversation(self, row: Any) -> Conversation:
        """Converts a row to a conversation. Raises `MalformedRow` if that is not possible."""

    def check(self, row: Any) -> None:
        """Checks a row; called once for all rows, in order, before any is used. Raises `MalformedRow`."""
        self.conversation(row)

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
    def _checked(self) -> np.ndarray:
        """Indices of the valid rows, uint32."""
        good, complaints = array("I"), list[str]()
        with ProgressBar(f"Checking {self.name}", len(self.rows), unit="rows") as bar:
            for index in bar.track(range(len(self.rows))):
                try:
                    self.check(self.rows[index])
                    good.append(index)
                except MalformedRow as error:
                    if len(complaints) < REPORTED_ROWS:
                        complaints.append(f"{self.rows.location(index)}: {error}")
        if complaints:
            count = len(self.rows) - len(good)
            listed = "\n  ".join(complaints + ["..."] * (count > len(complaints)))
            summary = f"{self.path or self.name}: {count} of {len(self.rows)} rows are malformed:\n  {listed}"
            if not self.skip_malformed or not good:
                alternative = ", or set `skip_malformed: true` to train without them" if good else ""
                raise UserError(f"{summary}; correct them{alternative}")
            warnings.warn(f"skipped, {summary}", stacklevel=2)
        if not good:
            raise UserError(f"{self.name}: {self.path or self.hub} contains no rows; give another path")
        return np.asarray(good)

    def chosen(self) -> np.ndarray:
        """Indices of the rows to use, integers, in order: all that are not malformed."""
        return self._checked

    @cached_property
    def _order(self) -> np.ndarray:
        good = self.chosen()
        if self.shuffle_seed is None:
            return good
        order = np.random.default_rng(self.shuffle_seed).permutation(len(self.rows))
        return order[np.isin(order, good)]  # malformed rows do not affect the order of the others

    def num_examples(self) -> int:
        return len(self._order)

    def example(self, index: int) -> Conversation:
        return self.conversation(self.rows[cast(int, self._order[index].item())])
