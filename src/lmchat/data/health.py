"""Health of data: duplicates, overlap with evaluation sets, and lengths, of each shard or task and over all."""

from __future__ import annotations

import hashlib
import heapq
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lmchat.data.evaluation_overlap import EvaluationFile, EvaluationOverlap
from lmchat.data.mixture import Mixture
from lmchat.data.near_duplicates import NearDuplicates
from lmchat.data.parquet_text import count_documents, list_shards, read_documents
from lmchat.data.token_health import check_mixture, check_tokens
from lmchat.data.word_grams import Hashes, word_hashes
from lmchat.progress import ProgressBar
from lmchat.tasks.base import Task, message_text
from lmchat.tokenizer.bpe import Tokenizer

LISTED = 10
_BEGINNING = 80
# Small enough for the processor's cache, so that the 120 hash functions run fast.
_BATCH_CHARACTERS = 1 << 18


@dataclass
class ShardHealth:
    """Numbers of a shard, or of a task of a mixture.

    Attributes:
        shard: file name, or split and task.
        documents: rows, including empty ones.
        empty: rows that are null or blank.
        exact_duplicates: documents equal to an earlier one of any shard.
        near_duplicates: other documents that resemble an earlier one.
        overlapping: documents with a 13-gram of an evaluation set.
        overlapping_grams: occurrences of such 13-grams.
    """

    shard: str
    documents: int = 0
    empty: int = 0
    characters: int = 0
    exact_duplicates: int = 0
    near_duplicates: int = 0
    overlapping: int = 0
    overlapping_grams: int = 0

    def __add__(self, other: ShardHealth) -> ShardHealth:
        names = [column.name for column in fields(self)[1:]]
        return ShardHealth("all", *(getattr(self, name) + getattr(other, name) for name in names))


@dataclass
class DataHealth:
    """Result of `check_shards` and `check_mixtures`.

    Attributes:
        shards: numbers of each shard.
        evaluation: examples of each evaluation set, and how many of them were found.
        longest: the longest documents: shard, row, characters, beginning.
        most_frequent: the documents with the most copies: shard and row of the first, copies, beginning.
        tokens: lengths and packing for each tokenizer with token files, or each mixture; see
            `lmchat.data.token_health`.
    """

    shards: list[ShardHealth]
    evaluation: list[dict[str, Any]] = field(default_factory=list)
    longest: list[dict[str, Any]] = field(default_factory=list)
    most_frequent: list[dict[str, Any]] = field(default_factory=list)
    tokens: list[dict[str, Any]] = field(default_factory=list)

    @property
    def total(self) -> ShardHealth:
        return sum(self.shards, ShardHealth("all"))


@dataclass(frozen=True)
class TextSource:
    """A shard, or a task of a mixture; ``read`` yields its documents, None for an empty one."""

    name: str
    documents: int
    read: Callable[[], Iterator[str | None]]


def check_shards(
    data_dir: Path,
    evaluation: Sequence[EvaluationFile] = (),
    *,
    similarity: float = 0.8,
    sequence_len: int = 2048,
) -> DataHealth:
    """Reads all shards of a folder once. Memory grows by up to 60 bytes per document.

    Args:
        similarity: Jaccard similarity of word 5-grams from which on documents are near duplicates.
        sequence_len: sequence length of the rows that token files are packed into.

    Raises:
        UserError: a shard, token file or evaluation set cannot be read.
    """
    shards = list_shards(data_dir)
    tokens = check_tokens(data_dir, shards, sequence_len)
    sources = [TextSource(shard.name, count_documents(shard), partial(read_documents, shard)) for shard in shards]
    return _check(sources, evaluation, similarity, tokens)


def check_mixtures(
    mixtures: Mapping[str, Mixture],
    tokenizer: Tokenizer,
    evaluation: Sequence[EvaluationFile] = (),
    *,
    similarity: float = 0.8,
    sequence_len: int = 2048,
) -> DataHealth:
    """Like `check_shards` for mixtures by split; a document is the text of a conversation, repetitions left out.

    Raises:
        UserError: a conversation is malformed, or an evaluation set cannot be read.
    """
    tokens = [check_mixture(split, mixture, tokenizer, sequence_len) for split, mixture in mixtures.items()]
    sources = [
        TextSource(f"{split}: {part.task.name}", len(part.task), partial(_texts, part.task))
        for split, mixture in mixtures.items()
        for part in mixture.parts
    ]
    return _check(sources, evaluation, similarity, tokens)


def _texts(task: Task) -> Iterator[str]:
    return ("\n\n".join(map(message_text, conversation["messages"])) for conversation in task)


def _check(
    sources: Sequence[TextSource],
    evaluation: Sequence[EvaluationFile],
    similarity: float,
    tokens: list[dict[str, Any]],
) -> DataHealth:
    checker = _Checker(sources, EvaluationOverlap(evaluation), similarity)
    total = sum(source.documents for source in sources)
    rows = ((number, *row) for number, source in enumerate(sources) for row in enumerate(source.read()))
    with ProgressBar("Checking documents", total, unit="documents") as bar:
        for number, row, text in bar.track(rows):
            checker.add(number, row, text)
        bar.set(total, "Comparing signatures")
        health = checker.finish()
    health.tokens = tokens
    return health


class _Checker:
    """Takes documents one by one; hashes are compared in batches."""

    def __init__(self, sources: Sequence[TextSource], overlap: EvaluationOverlap, similarity: float) -> None:
        self._sources = sources
        self._shards = [ShardHealth(source.name) for source in sources]
        self._overlap = overlap
        self._near = NearDuplicates(similarity)
        self._seen = _SeenHashes()
        self._hashes = array("Q")  # of all rows, in order
        self._copies = array("Q")
        self._longest: list[tuple[int, int, int, str]] = []
        self._words: list[Hashes] = []
        self._owners: list[int] = []
        self._batch: list[int] = []
        self._batch_characters = 0

    def add(self, shard: int, row: int, text: str | None) -> None:
        health = self._shards[shard]
        health.documents += 1
        if not text or text.isspace():
            health.empty += 1
            self._hashes.append(0)
            return
        health.characters += len(text)
        # Negated, so that the earliest of equally long documents stays.
        entry = (len(text), -shard, -row, text[:_BEGINNING])
        (heapq.heappush if len(self._longest) < LISTED else heapq.heappushpop)(self._longest, entry)
        digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        self._batch.append(int.from_bytes(digest) or 1)
        self._hashes.append(self._batch[-1])
        self._words.append(word_hashes(text))
        self._owners.append(shard)
        self._batch_characters += len(text)
        if self._batch_characters >= _BATCH_CHARACTERS:
            self._compare()

    def _compare(self) -> None:
        """Compares the batch with the evaluation sets, and adds the signatures of documents that are not copies."""
        for shard, grams in zip(self._owners, self._overlap.count(self._words).tolist(), strict=True):
            self._shards[shard].overlapping += grams > 0
            self._shards[shard].overlapping_grams += grams
        is_new = self._seen.add(np.array(self._batch, np.uint64))
        for number in (~is_new).nonzero()[0].tolist():
            self._shards[self._owners[number]].exact_duplicates += 1
            self._copies.append(self._batch[number])
        firsts = is_new.nonzero()[0].tolist()
        self._near.add([self._owners[number] for number in firsts], [self._words[number] for number in firsts])
        self._words, self._owners, self._batch, self._batch_characters = [], [], [], 0

    def _most_frequent(self) -> list[tuple[int, int, int]]:
        """Shard and row of the first, and number, of the documents with the most copies."""
        hashes, first_copies, copies = np.unique(
            np.frombuffer(self._copies, np.uint64), return_index=True, return_counts=True
        )
        rows, ends = np.frombuffer(self._hashes, np.uint64), np.cumsum([shard.documents for shard in self._shards])
        found = []
        for number in np.lexsort((first_copies, -copies))[:LISTED]:
            position = (rows == hashes[number]).argmax()
            shard = int(np.searchsorted(ends, position, side="right"))
            found.append((shard, int(position - ends[shard] + self._shards[shard].documents), int(copies[number]) + 1))
        return found

    def finish(self) -> DataHealth:
        self._compare()
        for shard, count in Counter(self._near.find().tolist()).items():
            self._shards[shard].near_duplicates = count
        return DataHealth(
            self._shards,
            self._overlap.report(),
            [
                {"shard": self._shards[-shard].shard, "row": -row, "characters": length, "beginning": beginning}
                for length, shard, row, beginning in sorted(self._longest, reverse=True)
            ],
            [
                {
                    "shard": self._shards[shard].shard,
                    "row": row,
                    "copies": copies,
                    "beginning": self._beginning(shard, row),
                }
                for shard, row, copies in self._most_frequent()
            ],
        )

    def _beginning(self, shard: int, row: int) -> str:
        return (next(islice(self._sources[shard].read(), row, None)) or "")[:_BEGINNING]


class _SeenHashes:
    """A set of hashes in some 16 bytes each: sorted arrays, each more than twice as long as the next."""

    def __init__(self) -> None:
        self._sorted: list[Hashes] = []

    def add(self, hashes: Hashes) -> npt.NDArray[np.bool_]:
        """Adds hashes; returns which of them are new, of equal ones the first."""
        is_new = np.zeros(len(hashes), dtype=bool)
        is_new[np.unique(hashes, return_index=True)[1]] = True
        for known in self._sorted:
            is_new &= known[np.searchsorted(known, hashes).clip(max=len(known) - 1)] != hashes
        if is_new.any():
            added = hashes[is_new]
            while self._sorted and len(self._sorted[-1]) <= 2 * len(added):
                added = np.concatenate([self._sorted.pop(), added])
            self._sorted.append(np.sort(added, kind="stable"))
        return is_new
