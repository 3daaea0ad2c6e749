from __future__ import annotations

import itertools
import random
from collections import Counter

from lmchat.tasks.patterns import expand, pick


def test_all_combinations_of_alternatives_occur() -> None:
    expected = {f"{who} made {whom}?" for who, whom in itertools.product(("Who", "Which man"), ("you", "me", "us"))}
    sentences = expand("[who|which man] made [you|me|us]?")
    assert set(sentences) == expected
    assert len(sentences) == len(expected)


def test_a_pattern_may_have_no_or_empty_alternatives() -> None:
    assert expand("thanks") == ("Thanks",)
    assert set(expand("[|okay, ]bye")) == {"Bye", "Okay, bye"}


def test_patterns_stay_in_order_and_are_always_the_same() -> None:
    sentences = expand("[a|b|c] x", "y", "[d|e|f] z")
    assert [sentence[-1] for sentence in sentences] == list("xxxYzzz")
    assert sentences == expand("[a|b|c] x", "y", "[d|e|f] z")
    assert sentences[:3] == expand("[a|b|c] x")


def test_every_fifth_sentence_covers_all_alternatives() -> None:
    letters = "abcdefghij"
    fifth = expand(f"[{'|'.join(letters)}] [{'|'.join(letters)}]")[4::5]
    assert Counter(sentence[0] for sentence in fifth) == dict.fromkeys(letters.upper(), 2)
    assert len({sentence[-1] for sentence in fifth}) >= 8


def test_picked_sentences_are_uniform() -> None:
    rng = random.Random(0)
    picked = Counter(pick("[who|which man] made [you|me|us]{n}?", rng) for _ in range(6_000))
    assert {sentence[0].upper() + sentence[1:] for sentence in picked} == set(
        expand("[who|which man] made [you|me|us]{n}?")
    )
    assert min(picked.values()) > 850
