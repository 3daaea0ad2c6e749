"""Spelling words and counting their letters: what a model that reads tokens, not letters, has to learn.

Questions and solutions are generated from a word list (see `words`). Solutions spell the word letter by letter, which
turns its tokens into those of its letters, and the counting is done step by step, then checked with the calculator.
"""

from __future__ import annotations

import random
from functools import cached_property
from string import ascii_lowercase
from typing import Any

from lmchat.tasks.base import Task, exchange, reference_answer
from lmchat.tasks.gsm8k import NumericAnswerTask
from lmchat.tasks.split import Split
from lmchat.tasks.words import read_words, split_words
from lmchat.types import Conversation, UserError

ABSENT_LETTER_SHARE = 0.1
"""Share of counting questions whose letter is drawn from the alphabet, not from the word."""

SPELL_QUESTIONS = (
    "Spell the word {word}",
    "Spell {word}",
    "Spell {word} for me",
    "Spell {word} letter by letter",
    "How do you spell {word}?",
    "How is {word} spelled?",
    "Can you spell {word}?",
    "Could you spell {word} for me, please?",
    "Please spell the word {word}",
    "What are the letters of {word}?",
    "Which letters is {word} made of?",
    "Write {word} one letter at a time",
    "List the letters in {word}",
    "Split {word} into its letters",
    "Spelling of {word}?",
    "Spell: {word}",
)

COUNT_QUESTIONS = (
    "How many {letter} are in {word}?",
    "How many {letter} are in the word {word}?",
    "How many {letter} are there in {word}?",
    "How many {letter} does {word} have?",
    "How many {letter} does the word {word} contain?",
    "How many {letter}s are in {word}?",
    "How many {letter}'s are in {word}?",
    "How many letters {letter} are in {word}?",
    "How many times does {letter} appear in {word}?",
    "How many times does the letter {letter} occur in the word {word}?",
    "How often does {letter} occur in {word}?",
    "How often is {letter} used in {word}?",
    "Count the {letter} in {word}",
    "Count the letter {letter} in {word}",
    "Count how many {letter} there are in {word}",
    "Count every {letter} in the word {word}, please",
    "Can you count the {letter} in {word}?",
    "Please tell me how many {letter} {word} has",
    "Tell me how often {letter} is in {word}",
    "What is the number of {letter} in {word}?",
    "Number of {letter} in {word}?",
    "In {word}, how many {letter} are there?",
    "In the word {word}, count the {letter}",
    "{word}: how many {letter}?",
)

QUOTES = ("", "'", '"')


def spell(word: str) -> str:
    """The word, a colon, and its letters between commas: ``cat:c,a,t``."""
    return f"{word}:{','.join(word)}"


class WordTask(Task):
    """A task whose examples are made of a word each."""

    def __init__(
        self,
        split: Split = "train",
        size: int | None = None,
        words_path: str | None = None,
        seed: int = 0,
        **slice: Any,
    ) -> None:
        """Choose words and number of examples.

        Args:
            split: train or test; no word is in both.
            size: number of examples; null: one for each word of the split.
            words_path: a file with a word a line; null: ``words.txt`` in the base folder.
            seed: order of the words, and wording of the questions.
            slice: see `Task`.
        """
        super().__init__(**slice)
        if size is not None and size < 1:
            raise UserError(f"{type(self).__name__}: size={size} is not possible; use 1 or more, or null")
        self.split = split
        self.size = size
        self.words_path = words_path
        self.seed = seed

    @property
    def name(self) -> str:
        return f"{super().name}/{self.split}"

    @cached_property
    def words(self) -> list[str]:
        """The split's words in the order in which the examples use them, over and over."""
        words = split_words(read_words(self.words_path), self.split)
        if not words:
            raise UserError(f"{self.name}: {self.words_path or 'the list'} has no {self.split} words; use a longer one")
        random.Random(f"{self.seed}").shuffle(words)
        return words

    def num_examples(self) -> int:
        return self.size if self.size is not None else len(self.words)

    def draw(self, index: int) -> tuple[str, random.Random]:
        """The word of an example and the example's own random numbers."""
        return self.words[index % len(self.words)], random.Random(f"{self.seed}/{self.split}/{index}")


def ask(templates: tuple[str, ...], rng: random.Random, **values: str) -> str:
    """One of ``templates`` filled in, with some variety in quotes, case and punctuation as users have it."""
    template = rng.choice(templates)
    if rng.random() < 0.2:
        template = template.rstrip("?")
    if rng.random() < 0.2:
        template = template[0].lower() + template[1:]
    quoted = {}
    for name, value in values.items():
        quote = rng.choice(QUOTES)
        quoted[name] = f"{quote}{value}{quote}"
    return template.format(**quoted)


class SimpleSpelling(WordTask):
    """Spell a word: ``cat:c,a,t``."""

    def example(self, index: int) -> Conversation:
        word, rng = self.draw(index)
        return exchange(ask(SPELL_QUESTIONS, rng, word=word), spell(word))

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        """Whether the completion is the word's spelling and nothing else."""
        return completion.strip() == reference_answer(conversation)


class SpellingBee(WordTask, NumericAnswerTask):
    """Count a letter in a word, first by spelling it, then with the calculator."""

    def example(self, index: int) -> Conversation:
        word, rng = self.draw(index)
        letter = rng.choice(ascii_lowercase if rng.random() < ABSENT_LETTER_SHARE else word)
        count = str(word.count(letter))
        return {
            "messages": [
                {"role": "user", "content": ask(COUNT_QUESTIONS, rng, letter=letter, word=word)},
                {
                    "role": "assistant",
                    "content": [
                        {"type": "text", "text": f"{count_by_hand(word, letter)}\n\nThe calculator says "},
                        {"type": "python", "text": f"'{word}'.count('{letter}')"},
                        {"type": "python_output", "text": count},
                        {"type": "text", "text": f"{count}.\n#### {count}"},
                    ],
                },
            ]
        }


def count_by_hand(word: str, letter: str) -> str:
    """The spelling of ``word``, then its letters one a line, with the count so far at each ``letter``."""
    lines = [f"I spell the word and count each {letter}:", spell(word)]
    count = 0
    for position, character in enumerate(word, 1):
        count += character == letter
        lines.append(f"{position}:{character}" + (f" that is {count}" if character == letter else ""))
    return "\n".join([*lines, f"I count {count}."])
