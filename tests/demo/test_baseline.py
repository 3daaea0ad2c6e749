from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmchat.demo.baseline import ByteNgramModel, compression_baselines
from lmchat.types import UserError

DOCUMENTS = ["the cat sat on the mat", "the dog sat on the log", "a cat and a dog", "that is the end of the tale"]


def grams(documents: list[str], length: int) -> Iterator[bytes]:
    stream = b"\0" * (length - 1) + b"".join(b"\0" + text.encode() for text in documents)
    for end in range(length, len(stream) + 1):
        yield stream[end - length : end]


class SlowKneserNey:
    """The formula of the model, on dictionaries of byte strings."""

    def __init__(self, documents: list[str], context_bytes: int) -> None:
        longest = Counter(grams(documents, context_bytes + 1))
        self.counts = [longest]
        while len(self.counts) <= context_bytes:
            self.counts.insert(0, Counter(gram[1:] for gram in self.counts[0]))

    def probability(self, context: bytes, byte: int) -> float:
        lower = self.probability(context[1:], byte) if context else 1 / 256
        counts = self.counts[len(context)]
        following = {gram[-1]: count for gram, count in counts.items() if gram[:-1] == context}
        if not following:
            return lower
        once, twice = (sum(count == n for count in counts.values()) for n in (1, 2))
        discount = once / (once + 2 * twice) if once and twice else 0.5
        kept = max(following.get(byte, 0) - discount, 0)
        return (kept + discount * len(following) * lower) / sum(following.values())


@pytest.mark.parametrize("context_bytes", [0, 1, 3])
def test_probabilities_equal_the_formula(context_bytes: int) -> None:
    slow = SlowKneserNey(DOCUMENTS, context_bytes)
    held_out = ["the cat and the dog", "zebra"]
    bits = [
        -math.log2(slow.probability(gram[:-1], gram[-1]))
        for gram in grams(held_out, context_bytes + 1)
        if gram[-1] != 0
    ]
    model = ByteNgramModel.train(DOCUMENTS, context_bytes=context_bytes)
    assert model.bits_per_byte([text.encode() for text in held_out]) == pytest.approx(sum(bits) / len(bits), rel=1e-12)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.text(alphabet="ab \0é", max_size=30), min_size=1, max_size=5).filter(any),
    st.binary(min_size=7, max_size=7),
    st.integers(0, 7),
)
def test_probabilities_of_the_next_byte_sum_to_one(documents: list[str], context: bytes, context_bytes: int) -> None:
    model = ByteNgramModel.train(documents, context_bytes=context_bytes)
    codes = np.array([int.from_bytes(context + bytes([byte])) for byte in range(256)], dtype=np.uint64)
    probabilities = model.probabilities(codes)
    assert (probabilities > 0).all()
    assert probabilities.sum() == pytest.approx(1, abs=1e-12)


def test_a_longer_context_improves_predictions() -> None:
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=6)) for _ in range(8)]
    texts = [" ".join(rng.choices(words, k=40)) for _ in range(300)]
    bits = [
        ByteNgramModel.train(texts[:290], context_bytes=n).bits_per_byte([text.encode() for text in texts[290:]])
        for n in (0, 2, 6)
    ]
    assert bits[0] > bits[1] > bits[2]
    # Seven bytes encode one of eight words.
    assert bits[2] == pytest.approx(math.log2(8) / 7, rel=0.05)


def test_training_text_is_bounded() -> None:
    model = ByteNgramModel.train(DOCUMENTS, context_bytes=2, max_bytes=len(DOCUMENTS[0]))
    assert model.bits_per_byte([b"dog"]) == ByteNgramModel.train(DOCUMENTS[:1], context_bytes=2).bits_per_byte([b"dog"])


def test_compressors_are_in_bits_per_byte() -> None:
    rng = random.Random(0)
    coin = ["".join(rng.choices("01", k=50_000))]
    baselines = compression_baselines(coin, ["".join(rng.choices("01", k=50_000))])
    assert baselines["ngram"] == pytest.approx(1.0, abs=0.01)
    assert 1.0 < baselines["xz"] < baselines["gzip"] < 1.4


def test_no_text_is_reported() -> None:
    with pytest.raises(UserError, match="no text to train"):
        compression_baselines(["", ""], ["a"])
    with pytest.raises(UserError, match="no validation text"):
        compression_baselines(["a"], [""])
