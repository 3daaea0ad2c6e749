"""Baselines for bits per byte on held-out text: general compressors and a byte n-gram model.

Comparable with `lmchat.evaluation.bits_per_byte`: document boundaries cost nothing in either.
"""

from __future__ import annotations

import gzip
import lzma
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lmchat.types import UserError

CONTEXT_BYTES = 6
MAX_TRAIN_BYTES = 16 << 20
_MAX_CONTEXT_BYTES = 7  # with the predicted byte, a 64-bit integer
_BOUNDARY = b"\0"

Codes = npt.NDArray[np.uint64]
Counts = npt.NDArray[np.int64]


def compression_baselines(train: Iterable[str], validation: Iterable[str]) -> dict[str, float]:
    """Bits per byte of ``gzip``, ``xz`` and ``ngram``, a model of the first `MAX_TRAIN_BYTES` of ``train``.

    Raises:
        UserError: one of the splits has no text.
    """
    held_out = [text.encode(errors="replace") for text in validation]
    model = ByteNgramModel.train(train)
    joined = b"\n".join(held_out)
    if not joined.strip(b"\n"):
        raise UserError("there is no validation text to compress")
    return {
        "gzip": 8 * len(gzip.compress(joined, compresslevel=9)) / len(joined),
        "xz": 8 * len(lzma.compress(joined, preset=9 | lzma.PRESET_EXTREME)) / len(joined),
        "ngram": model.bits_per_byte(held_out),
    }


@dataclass(frozen=True)
class _Order:
    """Counts of all grams of one length, and of their contexts (all bytes but the last). Codes are sorted."""

    grams: Codes
    gram_counts: Counts
    contexts: Codes
    context_counts: Counts
    continuations: Counts
    discount: float

    @classmethod
    def of(cls, grams: Codes, gram_counts: Counts) -> _Order:
        contexts, first, continuations = np.unique(grams >> np.uint64(8), return_index=True, return_counts=True)
        once, twice = (int((gram_counts == n).sum()) for n in (1, 2))
        return cls(
            grams=grams,
            gram_counts=gram_counts,
            contexts=contexts,
            context_counts=np.add.reduceat(gram_counts, first),
            continuations=continuations,
            # Ney, Essen & Kneser 1994; 0.5 if no gram occurs once or twice.
            discount=once / (once + 2 * twice) if once and twice else 0.5,
        )


class ByteNgramModel:
    """An interpolated Kneser-Ney model of bytes with one discount per order (Kneser & Ney 1995; Chen & Goodman 1999).

    P(c | h) = max(n(hc) − D, 0) / n(h·) + D · (number of c with n(hc) > 0) / n(h·) · P(c | h without its first byte),
    where n counts occurrences for the longest context and distinct preceding bytes for the shorter ones. Below the
    empty context is the uniform distribution over bytes.
    """

    def __init__(self, orders: list[_Order]) -> None:
        self._orders = orders

    @classmethod
    def train(
        cls, texts: Iterable[str], *, context_bytes: int = CONTEXT_BYTES, max_bytes: int = MAX_TRAIN_BYTES
    ) -> ByteNgramModel:
        """Counts the grams of up to ``context_bytes`` + 1 bytes in the first ``max_bytes`` of the documents.

        Raises:
            UserError: there is no text.
        """
        assert 0 <= context_bytes <= _MAX_CONTEXT_BYTES
        documents: list[bytes] = []
        for text in texts:
            documents.append(text.encode(errors="replace")[:max_bytes])
            max_bytes -= len(documents[-1])
            if max_bytes <= 0:
                break
        if not any(documents):
            raise UserError("there is no text to train the n-gram baseline on")
        codes, _ = _codes(documents, context_bytes + 1)
        orders = []
        for length in range(context_bytes + 1, 0, -1):
            grams, counts = np.unique(codes, return_counts=True)
            orders.append(_Order.of(grams, counts))
            # Each distinct gram is one distinct byte before the gram that is one byte shorter.
            codes = grams & _mask(length - 1)
        return cls(orders[::-1])

    def probabilities(self, codes: Codes) -> npt.NDArray[np.float64]:
        """P(last byte | bytes before it), (n,); ``codes`` (n,) are context and predicted byte as one integer."""
        result = np.full(len(codes), 1 / 256)
        for length, order in enumerate(self._orders, start=1):
            grams = codes & _mask(length)
            count = _lookup(order.grams, order.gram_counts, grams)
            contexts = grams >> np.uint64(8)
            total = _lookup(order.contexts, order.context_counts, contexts)
            back_off = order.discount * _lookup(order.contexts, order.continuations, contexts) * result
            known = total > 0
            seen = np.maximum(count - order.discount, 0)
            result[known] = (seen[known] + back_off[known]) / total[known]
        return result

    def bits_per_byte(self, documents: Iterable[bytes]) -> float:
        """Mean −log₂ P over the bytes of the documents."""
        codes, is_text = _codes(documents, len(self._orders))
        return float(-np.log2(self.probabilities(codes[is_text])).mean())


def _mask(length: int) -> np.uint64:
    return np.uint64((1 << 8 * length) - 1)


def _codes(documents: Iterable[bytes], length: int) -> tuple[Codes, npt.NDArray[np.bool_]]:
    """For each byte, the ``length`` bytes ending with it as an integer, and whether it is text and not a boundary.

    There is one boundary byte before each document, and as many as the context needs before the first.
    """
    joined = _BOUNDARY * (length - 1) + b"".join(_BOUNDARY + document for document in documents)
    stream = np.frombuffer(joined, dtype=np.uint8)
    count = len(stream) - length + 1
    codes = np.zeros(count, dtype=np.uint64)
    for at in range(length):
        codes = codes << np.uint64(8) | stream[at : at + count]
    return codes, stream[length - 1 :] != _BOUNDARY[0]


def _lookup(keys: Codes, values: Counts, wanted: Codes) -> Counts:
    """The values of the wanted keys, 0 for absent ones; ``keys`` must be sorted."""
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], 0)
