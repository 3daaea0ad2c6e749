"""Near duplicates among documents: MinHash signatures of word 5-grams, and locality-sensitive hashing in bands.

Two documents whose sets of 5-grams have the Jaccard similarity s become a candidate pair with probability
1 − (1 − s^6)^20, which is 99.8 % at s = 0.8. Candidates count if their signatures agree in at least the threshold.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from lmchat.data.word_grams import Hashes, gram_hashes, mix

GRAM_WORDS = 5
BANDS, ROWS = 20, 6
SIGNATURE = BANDS * ROWS
_COMPARED_AT_ONCE = 1 << 14
_KEY_FACTOR = np.uint64(0xD6E8FEB86659FD93)


class NearDuplicates:
    """Collects signatures of documents, 240 bytes each, and finds the near duplicates among them.

    Documents of fewer than 5 words have no signature and are never near duplicates.

    Args:
        threshold: Jaccard similarity, estimated with a standard error of at most 0.05, from which on documents count.
    """

    def __init__(self, threshold: float = 0.8) -> None:
        self.threshold = threshold
        random = np.random.default_rng(0)
        self._factors = random.integers(0, 1 << 32, SIGNATURE, dtype=np.uint32) | np.uint32(1)
        self._offsets = random.integers(0, 1 << 32, SIGNATURE, dtype=np.uint32)
        self._signatures = bytearray()
        self._labels: list[int] = []

    def add(self, labels: Sequence[int], documents: Sequence[Hashes]) -> None:
        """Adds documents by their word hashes; the label of a document, e.g. its shard, stands for it in the result."""
        hashes, counts = gram_hashes(documents, GRAM_WORDS)
        (present,) = counts.nonzero()
        if len(present):
            self._signatures += self._signatures_of(hashes, counts[present]).tobytes()
            self._labels += [labels[document] for document in present.tolist()]

    def _signatures_of(self, hashes: Hashes, counts: npt.NDArray[np.int64]) -> npt.NDArray[np.uint16]:
        """(documents, 120) uint16: the low bits of the minimum of each hash function."""
        starts = np.cumsum(counts) - counts
        grams = (hashes >> np.uint64(32)).astype(np.uint32)
        values = np.empty_like(grams)
        signatures = np.empty((len(counts), SIGNATURE), np.uint16)
        for column in range(SIGNATURE):
            np.multiply(grams, self._factors[column], out=values)
            values += self._offsets[column]
            signatures[:, column] = np.minimum.reduceat(values, starts).astype(np.uint16)
        return signatures

    def find(self) -> npt.NDArray[np.int64]:
        """Labels of the documents, in order, that resemble an earlier one, directly or over a chain of others."""
        signatures = np.frombuffer(self._signatures, np.uint16).reshape(-1, SIGNATURE)
        roots = np.arange(len(signatures))
        for band in range(0, SIGNATURE, ROWS):
            pairs = _candidates(signatures[:, band : band + ROWS])
            pairs = pairs[roots[pairs[:, 0]] != roots[pairs[:, 1]]]
            for start in range(0, len(pairs), _COMPARED_AT_ONCE):
                some = pairs[start : start + _COMPARED_AT_ONCE]
                agreement = (signatures[some[:, 0]] == signatures[some[:, 1]]).mean(axis=1)
                for first, second in some[agreement >= self.threshold].tolist():
                    _join(roots, first, second)
            while (roots[roots] != roots).any():
                roots = roots[roots]
        return np.array(self._labels, dtype=np.int64)[roots != np.arange(len(roots))]


def _candidates(rows: npt.NDArray[np.uint16]) -> npt.NDArray[np.int64]:
    """(pairs, 2): each document with equal rows, paired with the first such document and with the one before it."""
    keys = np.zeros(len(rows), np.uint64)
    for column in rows.T:
        keys = mix(keys * _KEY_FACTOR + column + np.uint64(1))
    order = np.argsort(keys, kind="stable")
    (repeated,) = (keys[order[1:]] == keys[order[:-1]]).nonzero()
    is_first = np.ones(len(order), dtype=bool)
    is_first[repeated + 1] = False
    firsts = np.maximum.accumulate(np.where(is_first, np.arange(len(order)), 0))
    own = order[repeated + 1]
    return np.concatenate([np.stack([order[firsts[repeated]], own], axis=1), np.stack([order[repeated], own], axis=1)])


def _join(roots: npt.NDArray[np.int64], first: int, second: int) -> None:
    """Puts two documents into one cluster, whose root is its earliest document."""
    while roots[first] != first:
        first = roots[first]
    while roots[second] != second:
        second = roots[second]
    roots[max(first, second)] = min(first, second)
