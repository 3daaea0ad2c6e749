"""Sentence patterns with alternatives in brackets."""

from __future__ import annotations

import random
import re

_ALTERNATIVES = re.compile(r"\[(.*?)\]")


def expand(*patterns: str) -> tuple[str, ...]:
    """The sentences of each pattern, in which ``[a|b]`` stands for one of its alternatives, first letters capitalised.

    Sentences with the same beginning stay together, and the alternatives that follow it are shuffled, always in the
    same way. So every n-th sentence is a fair sample: of each beginning alike, and not always of the same ending.
    """
    return tuple(sentence[0].upper() + sentence[1:] for pattern in patterns for sentence in _sentences(pattern))


def pick(pattern: str, rng: random.Random) -> str:
    """One of the pattern's sentences, each alternative as likely as the others of its brackets."""
    return _ALTERNATIVES.sub(lambda found: rng.choice(found[1].split("|")), pattern)


def _sentences(pattern: str) -> list[str]:
    rng = random.Random(pattern)
    sentences = [""]
    for part in _ALTERNATIVES.split(pattern):
        choices = part.split("|")
        sentences = [start + choice for start in sentences for choice in rng.sample(choices, len(choices))]
    return sentences
