"""What a task is: conversations to train on, and a way to grade an answer.

Adding one is a file with a subclass of `Task` (or of `rows.RowTask` for rows of a file or a hub data set) and one line
of YAML that names it by ``class_path`` with its ``init_args``.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import cached_property
from typing import ClassVar, Literal

from lmchat.types import Conversation, UserError

MUMBLED = 0.5
"""Reward of a right answer that has words which nobody gave the model."""


class Task(ABC):
    """A sequence of conversations whose last assistant message is the reference answer.

    Building a task is cheap: files are opened and data sets fetched at the first access to an example or to the length.
    """

    kind: ClassVar[Literal["generative", "categorical"]] = "generative"
    """How it is evaluated: by sampling an answer, or by comparing the logits of `letters`."""

    def __init__(self, start: int = 0, stop: int | None = None, step: int = 1) -> None:
        """Take every ``step``-th example from ``start`` up to, not including, ``stop``.

        Args:
            start: first example, counted from 0.
            stop: end of the slice; null or more than there are: all of them.
            step: distance between examples.
        """
        if start < 0 or step < 1 or (stop is not None and stop < start):
            raise UserError(
                f"{type(self).__name__}: the slice start={start}, stop={stop}, step={step} is not possible; "
                "use 0 <= start <= stop and step >= 1"
            )
        self.slice = slice(start, stop, step)

    @property
    def name(self) -> str:
        """What tables and logs call it."""
        return type(self).__name__

    @abstractmethod
    def num_examples(self) -> int:
        """Number of examples before slicing."""

    @abstractmethod
    def example(self, index: int) -> Conversation:
        """The conversation at ``index`` before slicing, the same at every call."""

    @cached_property
    def _indices(self) -> range:
        return range(self.num_examples())[self.slice]

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Conversation:
        return self.example(self._indices[index])

    def __iter__(self) -> Iterator[Conversation]:
        return map(self.example, self._indices)

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        """Whether ``completion`` answers the last user message of ``conversation`` correctly."""
        raise self._ungraded()

    def notes(self) -> list[str]:
        """What the user should know of the data, one line each."""
        return []

    def check_graded(self) -> None:
        """Raises `UserError` where the task has no correct answers."""
        if type(self).evaluate is Task.evaluate:
            raise self._ungraded()

    def _ungraded(self) -> UserError:
        return UserError(f"{self.name} has no correct answers; train on it, and evaluate on another task")

    def reward(self, conversation: Conversation, completion: str) -> float:
        """The reward of ``completion`` in reinforcement learning, by default 1 if it is correct, else 0."""
        return float(self.evaluate(conversation, completion))

    def letters(self, conversation: Conversation) -> list[str]:
        """The answers that a categorical question allows, in the order in which it lists them."""
        raise UserError(f"{self.name} is {self.kind}: its questions have no answer letters")


def reference_answer(conversation: Conversation) -> str:
    """The reference answer's text: the last assistant message, or its last part where it has parts."""
    content = conversation["messages"][-1]["content"]
    return content if isinstance(content, str) else content[-1]["text"]


def reward_in_words_of(correct: bool, completion: str, *texts: str) -> float:
    """0 if ``completion`` is wrong, 1 if it is right in words of ``texts`` alone, and `MUMBLED` if it has other words.

    Numbers, punctuation and special tokens do not matter, a ``#`` and a ``$`` count as words. Where only a number or a
    name decides, reinforcement learning otherwise wears off the words around it.
    """
    if not correct:
        return 0.0
    return 1.0 if _words(completion) <= _words(" ".join(texts)) else MUMBLED


def _words(text: str) -> set[str]:
    return set(re.findall(r"[^\W\d_]+|[#$]", re.sub(r"<\|.*?\|>", " ", text.lower())))


def answer_text(conversation: Conversation) -> str:
    """All of the reference answer, tool calls and their results included."""
    content = conversation["messages"][-1]["content"]
    return content if isinstance(content, str) else " ".join(part["text"] for part in content)


def exchange(question: str, answer: str) -> Conversation:
    """A conversation of one question and one answer."""
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
