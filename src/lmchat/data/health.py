"""Health of data: duplicates, overlap with evaluation sets, and lengths, of each shard or task and over all."""

from __future__ import annotations

import hashlib
import heapq
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from lmchat.data.evaluation_overlap import EvaluationFile, EvaluationOverlap
from lmchat.data.mixture import Mixture
from lmchat.data.near_duplicates import NearDuplicates
from lmchat.data.parquet_text import list_shards, open_parquet, read_documents
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
    """Reads all shards of a folder once. Memory grows by about 1 kB per document.

    Args:
        data_dir: folder of parquet shards.
        evaluation: files of evaluation sets.
        similarity: Jaccard similarity of word 5-grams from which on documents are near duplicates.
        sequence_len: sequence length of the rows that token files are packed into.

    Raises:
        UserError: a shard, token file or evaluation set cannot be read.
    """
    shards, sources = list_shards(data_dir), []
    tokens = check_tokens(data_dir, shards, sequence_len)
    for shard in shards:
        with open_parquet(shard) as parquet:
            sources.append(TextSource(shard.name, parquet.metadata.num_rows, partial(read_documents, shard)))
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
        self._places: dict[bytes, tuple[int, int]] = {}
        self._copies: Counter[bytes] = Counter()
        self._longest: list[tuple[int, int, int, str]] = []
        self._words: list[Hashes] = []
        self._owners: list[int] = []
        self._unique: list[bool] = []
        self._batch_characters = 0

    def add(self, shard: int, row: int, text: str | None) -> None:
        health = self._shards[shard]
        health.documents += 1
        if not text or text.isspace():
            health.empty += 1
            return
        health.characters += len(text)
        # Negated, so that the earliest of equally long documents stays.
        entry = (len(text), -shard, -row, text[:_BEGINNING])
        (heapq.heappush if len(self._longest) < LISTED else heapq.heappushpop)(self._longest, entry)
        digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        unique = self._places.setdefault(digest, (shard, row)) == (shard, row)
        if not unique:
            health.exact_duplicates += 1
            self._copies[digest] += 1
        self._words.append(word_hashes(text))
        self._owners.append(shard)
        self._unique.append(unique)
        self._batch_characters += len(text)
        if self._batch_characters >= _BATCH_CHARACTERS:
            self._compare()

    def _compare(self) -> None:
        """Compares the batch with the evaluation sets, and adds the signatures of documents that are not copies."""
        for shard, grams in zip(self._owners, self._overlap.count(self._words).tolist(), strict=True):
            self._shards[shard].overlapping += grams > 0
            self._shards[shard].overlapping_grams += grams
        firsts = [number for number, unique in enumerate(self._unique) if unique]
        self._near.add([self._owners[number] for number in firsts], [self._words[number] for number in firsts])
        self._words, self._owners, self._unique, self._batch_characters = [], [], [], 0

    def finish(self) -> DataHealth:
        self._compare()
        for shard, count in Counter(self._near.find().tolist()).items():
            self._shards[shard].near_duplicates = count
        frequent = [(*self._places[digest], copies + 1) for digest, copies in self._copies.most_common(LISTED)]
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
                for shard, row, copies in frequent
            ],
        )

    def _beginning(self, shard: int, row: int) -> str:
        return (next(islice(self._sources[shard].read(), row, None)) or "")[:_BEGINNING]
