"""Spelling words and counting letters, which is hard for models that read tokens instead of letters.

Questions and solutions are generated from a word list (see `words`). Solutions spell the word letter by letter, count
step by step, and check the count with the calculator. The idea and the format of a spelling, ``cat:c,a,t``, are
nanochat's.
"""

import random
from functools import cached_property
from string import ascii_lowercase
from typing import Any

from lmchat.tasks.base import (
    GeneratedTask,
    Graded,
    Split,
    exchange,
    in_split,
    message_text,
    reference_answer,
    reward_in_words_of,
)
from lmchat.tasks.gsm8k import NumericAnswerTask
from lmchat.tasks.patterns import pick
from lmchat.tasks.words import read_words
from lmchat.types import Conversation, Part, UserError
from lmchat.yaml_loading import load_package_yaml

ABSENT_LETTER_SHARE = 0.1
"""Share of counting questions whose letter is drawn from the alphabet instead of the word."""

_QUESTIONS = load_package_yaml("lmchat.tasks", "spelling.yaml")
SPELL_QUESTIONS, COUNT_QUESTIONS = tuple(_QUESTIONS["spell"]), tuple(_QUESTIONS["count"])
"""Patterns, see `patterns`."""

MAX_TRIES = 100
QUOTES = ("", "'", '"')


def spell(word: str) -> str:
    """The spelling of a word: ``cat:c,a,t``."""
    return f"{word}:{','.join(word)}"


class WordTask(GeneratedTask):
    """Base class of tasks with one word per example.

    Args:
        split: train or test; no word is in both.
        size: number of examples; null is one per word of the split.
        words_path: a file with one word per line; null is ``words.txt`` in the base folder.
        made_up: share of words that are not in the list but made of the beginning of one and the end of another,
            to train on rare tokens; smaller if few such words are new.
        seed: seed of the order of the words and of the wording of the questions.
        slice: see `Task`.
    """

    def __init__(
        self,
        split: Split = "train",
        size: int | None = None,
        words_path: str | None = None,
        made_up: float = 0.0,
        seed: int = 0,
        **slice: Any,
    ) -> None:
        super().__init__(split, size, seed, **slice)
        if not 0 <= made_up <= 1:
            raise UserError(f"{type(self).__name__}: made_up={made_up} is not possible; use a share from 0 to 1")
        self.words_path = words_path
        self.made_up = made_up

    @cached_property
    def words(self) -> list[str]:
        """The words of the split in the order in which examples use them, cyclically."""
        words = [word for word in read_words(self.words_path) if in_split(word, self.split)]
        if not words:
            raise UserError(f"{self.name}: {self.words_path or 'the list'} has no {self.split} words; use a longer one")
        random.Random(f"{self.seed}").shuffle(words)
        return words

    @cached_property
    def _listed(self) -> frozenset[str]:
        return frozenset(self.words)

    def num_examples(self) -> int:
        return self.size if self.size is not None else len(self.words)

    def draw(self, index: int) -> tuple[str, random.Random]:
        """The word of an example, and the example's random number generator."""
        rng = self.rng(index)
        word = self.words[index % len(self.words)]
        return (self._made_up(word, rng) if rng.random() < self.made_up else word), rng

    def _made_up(self, word: str, rng: random.Random) -> str:
        """The beginning of ``word`` and the end of another word, in the same split; ``word`` if none is found."""
        for _ in range(MAX_TRIES):
            other = rng.choice(self.words)
            cut = rng.randint(1, min(len(word), len(other)))
            made_up = word[:cut] + other[cut:]
            if made_up not in self._listed and in_split(made_up, self.split):
                return made_up
        return word


def ask(patterns: tuple[str, ...], rng: random.Random, **values: str) -> str:
    """A random pattern filled in, with random quotes, case and punctuation, as users write."""
    template = pick(rng.choice(patterns), rng)
    first = template[0].lower() if rng.random() < 0.2 else template[0].upper()
    template = first + template[1:]
    if rng.random() < 0.2:
        template = template.removesuffix("?") if template.endswith("?") else template + "."
    quoted = {name: (quote := rng.choice(QUOTES)) + value + quote for name, value in values.items()}
    return template.format(**quoted)


class SimpleSpelling(WordTask, Graded):
    """Spell a word: ``cat:c,a,t``."""

    def example(self, index: int) -> Conversation:
        word, rng = self.draw(index)
        return exchange(ask(SPELL_QUESTIONS, rng, word=word), spell(word))

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        """Whether the completion is exactly the spelling."""
        return completion.strip() == reference_answer(conversation)


class SpellingBee(WordTask, NumericAnswerTask):
    """Count a letter in a word, first by spelling it, then with the calculator."""

    def reward(self, conversation: Conversation, completion: str) -> float:
        """1 for a correct count in words of the reference answer, else less; see `base.reward_in_words_of`."""
        known = message_text(conversation["messages"][-1])
        return reward_in_words_of(self.evaluate(conversation, completion), completion, known)

    def example(self, index: int) -> Conversation:
        word, rng = self.draw(index)
        letter = rng.choice(ascii_lowercase if rng.random() < ABSENT_LETTER_SHARE else word)
        count = str(word.count(letter))
        answer: list[Part] = [
            {"type": "text", "text": f"{count_by_hand(word, letter)}\n\nThe calculator says "},
            {"type": "python", "text": f"'{word}'.count('{letter}')"},
            {"type": "python_output", "text": count},
            {"type": "text", "text": f"{count}.\n#### {count}"},
        ]
        return exchange(ask(COUNT_QUESTIONS, rng, letter=letter, word=word), answer)


def count_by_hand(word: str, letter: str) -> str:
    """The spelling of ``word``, then one letter per line, with the count so far at each ``letter``.

    No other answer begins with its first words: RL turned the former "I spell" into the "I speak" of other answers.
    """
    lines = [f'Count each "{letter}":', spell(word)]
    for position, character in enumerate(word, 1):
        count = word[:position].count(letter)
        lines.append(f"{position}:{character}" + (f" that is {count}" if character == letter else ""))
    return "\n".join([*lines, f"I count {count}."])
