"""Near duplicates among documents: MinHash signatures of word 5-grams, and locality-sensitive hashing in bands.

Two documents whose sets of 5-grams have the Jaccard similarity s become a candidate pair with probability
1 − (1 − s^6)^20, which is 99.8 % at s = 0.8. Candidates count if their signatures agree in at least the threshold.
"""

import os
import tempfile
from array import array
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from lmchat.data.word_grams import Hashes, gram_hashes, mix
from lmchat.types import user_errors

GRAM_WORDS = 5
BANDS, ROWS = 20, 6
SIGNATURE = BANDS * ROWS
_COMPARED_AT_ONCE = 1 << 14
_READ_AT_ONCE = 1 << 16
_SIGNATURE_BYTES = 2 * SIGNATURE
_KEY_FACTOR = np.uint64(0xD6E8FEB86659FD93)


class NearDuplicates:
    """Collects signatures of documents, 240 bytes each in a temporary file, and finds the near duplicates among them.

    Documents of fewer than 5 words have no signature and are never near duplicates.

    Args:
        threshold: Jaccard similarity, estimated with a standard error of at most 0.05, from which on documents count.
    """

    def __init__(self, threshold: float = 0.8) -> None:
        self.threshold = threshold
        random = np.random.default_rng(0)
        self._factors = random.integers(0, 1 << 32, SIGNATURE, dtype=np.uint32) | np.uint32(1)
        self._offsets = random.integers(0, 1 << 32, SIGNATURE, dtype=np.uint32)
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  # lives as long as the signatures
        self._labels = array("I")

    def add(self, labels: Sequence[int], documents: Sequence[Hashes]) -> None:
        """Adds documents by their word hashes; the label of a document, e.g. its shard, stands for it in the result."""
        hashes, counts = gram_hashes(documents, GRAM_WORDS)
        (present,) = counts.nonzero()
        if len(present):
            problem = f"cannot write the signatures of documents to {tempfile.gettempdir()}"
            remedy = f"make room for {_SIGNATURE_BYTES} bytes per document, or name another folder in TMPDIR"
            with user_errors(problem, remedy, OSError):
                self._file.write(self._signatures_of(hashes, counts[present]).tobytes())
            self._labels.extend(labels[document] for document in present.tolist())

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
        roots = np.arange(len(self._labels))
        for band in range(0, SIGNATURE, ROWS):
            pairs = _candidates(self._keys(band))
            pairs = pairs[roots[pairs[:, 0]] != roots[pairs[:, 1]]]
            for start in range(0, len(pairs), _COMPARED_AT_ONCE):
                some = pairs[start : start + _COMPARED_AT_ONCE]
                agreement = (self.signatures(some[:, 0]) == self.signatures(some[:, 1])).mean(axis=1)
                for first, second in some[agreement >= self.threshold].tolist():
                    _join(roots, first, second)
            while (roots[roots] != roots).any():
                roots = roots[roots]
        return np.array(self._labels, dtype=np.int64)[roots != np.arange(len(roots))]

    def signatures(self, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.uint16]:
        """(documents, 120) uint16: signatures of some documents. Mapped pages would count as memory of the process."""
        self._file.flush()
        file, size = self._file.fileno(), _SIGNATURE_BYTES
        content = b"".join(os.pread(file, size, size * number) for number in numbers.tolist())
        return np.frombuffer(content, np.uint16).reshape(-1, SIGNATURE)

    def _keys(self, band: int) -> Hashes:
        """(documents,) uint64: hashes of the rows of a band."""
        self._file.flush()
        keys = np.zeros(len(self._labels), np.uint64)
        for start in range(0, len(keys), _READ_AT_ONCE):
            content = os.pread(self._file.fileno(), _READ_AT_ONCE * _SIGNATURE_BYTES, start * _SIGNATURE_BYTES)
            some = keys[start : start + _READ_AT_ONCE]
            for column in np.frombuffer(content, np.uint16).reshape(-1, SIGNATURE)[:, band : band + ROWS].T:
                some[:] = mix(some * _KEY_FACTOR + column + np.uint64(1))
        return keys


def _candidates(keys: Hashes) -> npt.NDArray[np.int64]:
    """(pairs, 2): each document with an earlier one's key, paired with the first such document and the one before."""
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    (before,) = (keys[1:] == keys[:-1]).nonzero()
    starts = np.diff(before, prepend=-2) != 1  # of runs of equal keys
    firsts = np.maximum.accumulate(np.where(starts, before, 0))
    own = order[before + 1]
    return np.concatenate([np.stack([order[firsts], own], axis=1), np.stack([order[before], own], axis=1)])


def _join(roots: npt.NDArray[np.int64], first: int, second: int) -> None:
    """Puts two documents into one cluster, whose root is its earliest document."""
    while roots[first] != first:
        first = roots[first]
    while roots[second] != second:
        second = roots[second]
    roots[max(first, second)] = min(first, second)
