"""Overlap of documents with evaluation sets: word 13-grams that occur in both."""

import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import numpy.typing as npt

from lmchat.data.word_grams import Hashes, gram_hashes, word_hashes
from lmchat.parquet_pages import MAX_ROWS
from lmchat.progress import ProgressBar
from lmchat.records import (
    DAMAGE,
    JSON_LINES_SUFFIXES,
    JSON_SUFFIXES,
    PARQUET_SUFFIX,
    find_files,
    json_values,
    kind_of,
    open_text,
)
from lmchat.types import UserError, user_errors

EvaluationFile = Path | zipfile.Path

GRAM_WORDS = 13
_KINDS = (*JSON_LINES_SUFFIXES, *JSON_SUFFIXES, PARQUET_SUFFIX)
_MAX_CHARACTERS = 10_000_000
_FILTER_BITS = 26
_FILTER_SHIFT = np.uint64(64 - _FILTER_BITS)
_REMEDY = "restore it or leave it out"


def evaluation_files(path: Path) -> list[EvaluationFile]:
    """The evaluation sets in a folder and its subfolders or in a zip file, or ``path`` itself.

    Raises:
        UserError: there are none.
    """
    if not path.exists():
        raise UserError(f"there is no evaluation set {path}; give files of {' '.join(_KINDS)} with --evaluation")
    files: list[EvaluationFile] = [*find_files(path, _KINDS).files]
    if path.suffix.lower() == ".zip":
        with user_errors(f"cannot read the evaluation set {path}", _REMEDY, OSError, zipfile.BadZipFile):
            archive = zipfile.ZipFile(path)
        names = [info.filename for info in archive.infolist() if not info.is_dir()]
        files = [zipfile.Path(archive, name) for name in sorted(names) if kind_of(Path(name))[0] in _KINDS]
    if not files:
        raise UserError(f"{path} contains no evaluation set; the kinds are {' '.join(_KINDS)}, JSON also compressed")
    return files


class EvaluationOverlap:
    """Compares documents with evaluation sets. A set is a file, an example one record; its strings are compared.

    Raises:
        UserError: a file cannot be read.
    """

    def __init__(self, files: Sequence[EvaluationFile]) -> None:
        self.files = list(files)
        self._examples = [0] * len(self.files)
        parts: list[Hashes] = [np.empty(0, np.uint64)]
        lengths: list[int] = [0]
        self._set_of: list[int] = [0]
        with ProgressBar("Reading evaluation sets", len(self.files), unit="files") as bar:
            for number, path in enumerate(bar.track(self.files)):
                for record in read_records(path):
                    grams, _ = gram_hashes([word_hashes(text) for text in strings_of(record)], GRAM_WORDS)
                    self._examples[number] += 1
                    if len(grams):
                        parts.append(np.unique(grams))
                        lengths.append(len(parts[-1]))
                        self._set_of.append(number)
        # Example 0 stands for none, so that an array of examples is never empty.
        self._grams, self._gram_of = np.unique(np.concatenate(parts), return_inverse=True)
        self._example_of = np.repeat(np.arange(len(lengths)), lengths)
        self._found = np.zeros(len(self._grams), dtype=bool)
        self._filter = np.zeros(1 << _FILTER_BITS if len(self._grams) else 1, dtype=bool)
        self._filter[self._grams >> _FILTER_SHIFT] = True

    def count(self, documents: Sequence[Hashes]) -> npt.NDArray[np.int64]:
        """(documents,) numbers of 13-grams that occur in an evaluation set, given the word hashes of each document."""
        if not len(self._grams):
            return np.zeros(len(documents), dtype=np.int64)
        hashes, counts = gram_hashes(documents, GRAM_WORDS)
        (possible,) = self._filter[hashes >> _FILTER_SHIFT].nonzero()
        positions = np.searchsorted(self._grams, hashes[possible]).clip(max=len(self._grams) - 1)
        equal = self._grams[positions] == hashes[possible]
        self._found[positions[equal]] = True
        owners = np.searchsorted(np.cumsum(counts), possible[equal], side="right")
        return np.bincount(owners, minlength=len(documents))

    def report(self) -> list[dict[str, Any]]:
        """For each evaluation set: its examples, those with at least one 13-gram, and those of them that were found."""
        found = np.unique(self._example_of[self._found[self._gram_of]])
        sets = np.array(self._set_of)
        checked = np.bincount(sets[1:], minlength=len(self.files))
        overlapping = np.bincount(sets[found], minlength=len(self.files))
        return [
            {
                "file": str(path),
                "examples": self._examples[number],
                "checked": int(checked[number]),
                "overlapping": int(overlapping[number]),
                "share": float(overlapping[number] / max(checked[number], 1)),
            }
            for number, path in enumerate(self.files)
        ]


def read_records(path: EvaluationFile) -> Iterator[Any]:
    """Yields the records of a JSON or parquet file. Raises `UserError` if it cannot be read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = (OSError, ValueError, pa.ArrowException, zipfile.BadZipFile, *DAMAGE)
    with user_errors(f"cannot read the evaluation set {path}", _REMEDY, *kinds), path.open("rb") as raw:
        if path.suffix.lower() == PARQUET_SUFFIX:
            with pq.ParquetFile(raw) as parquet:
                for batch in parquet.iter_batches(batch_size=MAX_ROWS):
                    yield from batch.to_pylist()
        else:
            with open_text(Path(str(path)), cast(BinaryIO, raw)) as (file, _):
                yield from json_values(file, str(path), _MAX_CHARACTERS)


def strings_of(value: Any) -> Iterator[str]:
    """The strings in a JSON value, in order, without the names of fields."""
    pending = [value]  # no recursion: values may be deeply nested
    while pending:
        value = pending.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict | list):
            pending += reversed(list(value.values()) if isinstance(value, dict) else value)
