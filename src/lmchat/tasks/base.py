"""Base class of tasks (conversations to train on), and protocols of tasks that grade answers.

To add a task, subclass `Task` (or `rows.RowTask` for rows of a file or a Hub dataset), and give its ``class_path`` and
``init_args`` in a config. If it grades answers, inherit `Graded` too.
"""

import random
import re
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Protocol, runtime_checkable

from lmchat.option_checks import check_count
from lmchat.types import Conversation, Message, Part, UserError

Split = Literal["train", "test"]

TEST_SHARE = 10
"""One in this many keys is a test key."""

UNSEEN_WORDS_REWARD = 0.5
"""Reward of a correct answer with words in neither question nor reference."""


class Task(ABC):
    """A sequence of conversations whose last assistant message is the reference answer.

    Constructors must be cheap: files are opened and datasets downloaded when an example or the length is first needed.

    Args:
        start: first example, counted from 0.
        stop: end (exclusive); null is the end of the task.
        step: distance between examples.
    """

    def __init__(self, start: int = 0, stop: int | None = None, step: int = 1) -> None:
        if start < 0 or step < 1 or (stop is not None and stop < start):
            raise UserError(
                f"{type(self).__name__}: the slice start={start}, stop={stop}, step={step} is not possible; "
                "use 0 <= start <= stop and step >= 1"
            )
        self.slice = slice(start, stop, step)

    @property
    def name(self) -> str:
        """Name in tables and logs."""
        return type(self).__name__

    @abstractmethod
    def num_examples(self) -> int:
        """Number of examples before slicing."""

    @abstractmethod
    def example(self, index: int) -> Conversation:
        """The conversation at ``index`` before slicing; deterministic."""

    @cached_property
    def _indices(self) -> range:
        return range(self.num_examples())[self.slice]

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Conversation:
        return self.example(self._indices[index])

    def __iter__(self) -> Iterator[Conversation]:
        return map(self.example, self._indices)

    def notes(self) -> list[str]:
        """Remarks on the data for the user, one line each."""
        return []


class GeneratedTask(Task):
    """Base class of tasks whose examples are generated from their index.

    Args:
        split: train or test.
        size: number of examples.
        seed: other seeds give other examples.
        slice: see `Task`.
    """

    def __init__(self, split: Split, size: int | None, seed: int, **slice: Any) -> None:
        super().__init__(**slice)
        check_count(None, 1, **{f"{type(self).__name__}: size": size})
        self.split = split
        self.size = size
        self.seed = seed

    @property
    def name(self) -> str:
        return f"{super().name}/{self.split}"

    def num_examples(self) -> int:
        assert self.size is not None
        return self.size

    def rng(self, index: int) -> random.Random:
        """The random number generator of an example."""
        return random.Random(f"{self.seed}/{self.split}/{index}")


def in_split(key: str, split: Split) -> bool:
    """Whether ``key`` belongs to ``split``.

    A hash of the key decides, so the splits of generated examples are disjoint for all options and word lists.
    """
    return (zlib.crc32(key.encode()) % TEST_SHARE == 0) == (split == "test")


@runtime_checkable
class Graded(Protocol):
    """Grades the text of answers. Tasks inherit it in addition to `Task`."""

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        """Whether ``completion`` is a correct answer to the last user message of ``conversation``."""

    def reward(self, conversation: Conversation, completion: str) -> float:
        """The reward of ``completion`` in reinforcement learning; by default 1 if it is correct, else 0."""
        return float(self.evaluate(conversation, completion))


@dataclass(frozen=True)
class CodeCheck:
    """A program of a model and its tests.

    Attributes:
        program: source that defines the function; what the model wrote, which may do harm.
        entry_point: name of the function.
        tests: source that defines ``check(function)``, which raises if the function is wrong.
        setup: source of other definitions that the tests use.
    """

    program: str
    entry_point: str
    tests: str
    setup: str = ""


@runtime_checkable
class GradedByTests(Protocol):
    """Answers that are programs, graded by running their tests in a sandbox. Tasks inherit it in addition to `Task`."""

    def code_check(self, conversation: Conversation, completion: str) -> CodeCheck:
        """The program in ``completion``, an answer to ``conversation``, and its tests."""


@runtime_checkable
class MultipleChoice(Graded, Protocol):
    """Grades answers that are one of a few letters, so that evaluation can compare their probabilities."""

    def letters(self, conversation: Conversation) -> list[str]:
        """The possible answers to a question, in order."""


def graded(task: Task) -> Graded:
    """Checks that a task grades answers, and returns it.

    Raises:
        UserError: it does not.
    """
    if isinstance(task, GradedByTests):
        raise UserError(f"the answers to {task.name} are programs; use lmchat eval, which runs them")
    if not isinstance(task, Graded):
        raise UserError(f"{task.name} has no correct answers; train on it, and evaluate on another task")
    return task


def reference_answer(conversation: Conversation) -> str:
    """Text of the reference answer: the last assistant message, or its last part if it has parts."""
    content = conversation["messages"][-1]["content"]
    return content if isinstance(content, str) else content[-1]["text"]


def reward_in_words_of(correct: bool, completion: str, *texts: str) -> float:
    """Reward of an answer, reduced if it has words that are not in ``texts``.

    If only a number or a name is graded, reinforcement learning otherwise degrades the words around it.

    Numbers, punctuation and special tokens are always allowed, except that ``#`` and ``$`` count as words.

    Returns:
        0 if the answer is wrong; 1 if it is correct and has only words of ``texts``; else `UNSEEN_WORDS_REWARD`.
    """
    if not correct:
        return 0.0
    return 1.0 if _words(completion) <= _words(" ".join(texts)) else UNSEEN_WORDS_REWARD


def _words(text: str) -> set[str]:
    return set(re.findall(r"[^\W\d_]+|[#$]", re.sub(r"<\|.*?\|>", " ", text.lower())))


def message_text(message: Message) -> str:
    """Text of a message, including tool calls and their results."""
    content = message["content"]
    return content if isinstance(content, str) else " ".join(part["text"] for part in content)


def exchange(question: str, answer: str | list[Part]) -> Conversation:
    """A conversation of one question and one answer."""
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
