"""Hashes of the word n-grams of documents, for near duplicates and for overlap with evaluation sets."""

import re
import zlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Hashes = npt.NDArray[np.uint64]

_WORD = re.compile(r"\w+")
_FACTOR = np.uint64(0x9E3779B97F4A7C15)


def word_hashes(text: str) -> Hashes:
    """(words,) uint64 hashes of the words of a text in lower case, without punctuation; the same in every process.

    Text without spaces between words, such as Chinese, has few and long ones.
    """
    words = "\n".join(_WORD.findall(text.lower())).encode("utf-8", "surrogatepass").splitlines()
    return mix(np.fromiter(map(zlib.crc32, words), np.uint64, len(words)))


def gram_hashes(documents: Sequence[Hashes], n: int) -> tuple[Hashes, npt.NDArray[np.int64]]:
    """Hashes of the n-grams of several documents, given the word hashes of each.

    Returns:
        The hashes of all n-grams in order, and the (documents,) numbers of n-grams of each document.
    """
    lengths = np.array([len(words) for words in documents], dtype=np.int64)
    counts = (lengths - n + 1).clip(min=0)
    if not counts.any():
        return np.empty(0, np.uint64), counts
    words = np.concatenate(documents)
    starts = len(words) - n + 1
    hashes = np.zeros(starts, np.uint64)
    for offset in range(n):
        hashes *= _FACTOR
        hashes += words[offset : offset + starts]
    ends = np.repeat(np.cumsum(lengths), lengths)[:starts]
    return mix(hashes[np.arange(n, n + starts) <= ends]), counts


def mix(hashes: Hashes) -> Hashes:
    """Spreads every bit over the whole number, in place (the finalizer of splitmix64)."""
    hashes ^= hashes >> np.uint64(30)
    hashes *= np.uint64(0xBF58476D1CE4E5B9)
    hashes ^= hashes >> np.uint64(27)
    hashes *= np.uint64(0x94D049BB133111EB)
    hashes ^= hashes >> np.uint64(31)
    return hashes
