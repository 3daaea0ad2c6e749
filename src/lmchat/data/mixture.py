"""A mixture of tasks, each repeated for its number of epochs, shuffled once."""

from __future__ import annotations

import bisect
import random
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import numpy as np

from lmchat.option_checks import check_count
from lmchat.tasks.base import Task
from lmchat.types import Conversation, UserError


@dataclass(frozen=True)
class MixturePart:
    """A task's share in a mixture.

    Args:
        epochs: number of times that each conversation occurs.
    """

    task: Task
    epochs: int = 1

    def __post_init__(self) -> None:
        check_count(None, 1, **{f"mixture: epochs of {self.task.name}": self.epochs})


class Mixture:
    """Conversations of several tasks in a fixed random order, with random access."""

    def __init__(self, parts: list[MixturePart], shuffle_seed: int | None = 42) -> None:
        """Sets the tasks and their order.

        Args:
            parts: tasks with their epochs. A task may occur more than once.
            shuffle_seed: seed of ``random.Random(seed).shuffle``, as in nanochat; null keeps one task after the other,
                as in a curriculum.
        """
        if not parts:
            raise UserError("mixture: there are no parts; name at least one task")
        self.parts = parts
        self.shuffle_seed = shuffle_seed

    @cached_property
    def _starts(self) -> list[int]:
        """Start of each part before the shuffle, and the end of the last one."""
        return list(accumulate((len(part.task) * part.epochs for part in self.parts), initial=0))

    @cached_property
    def _order(self) -> np.ndarray:
        """For each position after the shuffle the position before it, uint32."""
        order = array("I", range(len(self)))
        if self.shuffle_seed is not None:
            random.Random(self.shuffle_seed).shuffle(order)
        return np.asarray(order)

    def __len__(self) -> int:
        return self._starts[-1]

    def locate(self, index: int) -> tuple[Task, int]:
        """The task at ``index``, and the index of the conversation within it."""
        part, local = self._find(index)
        return self.parts[part].task, local

    def _find(self, index: int) -> tuple[int, int]:
        position = int(self._order[index])
        part = bisect.bisect_right(self._starts, position) - 1
        return part, (position - self._starts[part]) % len(self.parts[part].task)

    def source(self, index: int) -> int:
        """A number below the length, which is the same for all repetitions of a conversation by its part."""
        part, local = self._find(index)
        return self._starts[part] + local

    def __getitem__(self, index: int) -> Conversation:
        task, local = self.locate(index)
        return task[local]

    def __iter__(self) -> Iterator[Conversation]:
        return (self[index] for index in range(len(self)))

    @property
    def part_numbers(self) -> np.ndarray:
        """(conversations,) of the smallest unsigned dtype, index in ``parts`` of the part of each conversation."""
        numbers = np.searchsorted(self._starts, self._order, side="right") - 1
        return numbers.astype(np.min_scalar_type(len(self.parts)))

    def notes(self) -> list[str]:
        """Remarks on the tasks' data for the user, without repetitions."""
        return list(dict.fromkeys(note for part in self.parts for note in part.task.notes()))

    def counts(self) -> dict[str, int]:
        """Number of conversations of each task by name, including repetitions."""
        counts: Counter[str] = Counter()
        for part in self.parts:
            counts[part.task.name] += len(part.task) * part.epochs
        return dict(counts)
