"""Sentence patterns with alternatives in brackets."""

import random
import re

_ALTERNATIVES = re.compile(r"\[(.*?)\]")


def expand(*patterns: str) -> tuple[str, ...]:
    """All sentences of the patterns, capitalised; ``[a|b]`` stands for either alternative.

    Sentences with the same beginning are adjacent, and the alternatives after it are in a fixed random order, so that
    every n-th sentence is a balanced sample of beginnings and endings.
    """
    return tuple(sentence[0].upper() + sentence[1:] for pattern in patterns for sentence in _sentences(pattern))


def pick(pattern: str, rng: random.Random) -> str:
    """A random sentence of the pattern; the alternatives of a bracket are equally likely."""
    return _ALTERNATIVES.sub(lambda found: rng.choice(found[1].split("|")), pattern)


def _sentences(pattern: str) -> list[str]:
    rng = random.Random(pattern)
    sentences = [""]
    for part in _ALTERNATIVES.split(pattern):
        choices = part.split("|")
        sentences = [start + choice for start in sentences for choice in rng.sample(choices, len(choices))]
    return sentences
