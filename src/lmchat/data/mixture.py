"""A mixture of tasks, each repeated for its number of epochs, shuffled once; and the fingerprint of its content."""

import bisect
import hashlib
import json
import random
import zlib
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt

from lmchat.option_checks import check_count, damaged_position
from lmchat.tasks.base import Task
from lmchat.types import Conversation, UserError

_ORDER = "order"


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
    """Conversations of several tasks in a fixed random order, with random access.

    Args:
        parts: tasks with their epochs. A task may occur more than once.
        shuffle_seed: seed of ``random.Random(seed).shuffle``, as in nanochat; null keeps one task after the other, as
            in a curriculum.
    """

    def __init__(self, parts: list[MixturePart], shuffle_seed: int | None = 42) -> None:
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

    def locate(self, index: int) -> tuple[int, int]:
        """The index in ``parts`` of the conversation at ``index``, and its index in the part's task."""
        position = int(self._order[index])
        part = bisect.bisect_right(self._starts, position) - 1
        return part, (position - self._starts[part]) % len(self.parts[part].task)

    def source(self, index: int) -> int:
        """A number below the length, which is the same for all repetitions of a conversation by its part."""
        part, local = self.locate(index)
        return self._starts[part] + local

    def __getitem__(self, index: int) -> Conversation:
        part, local = self.locate(index)
        return self.parts[part].task[local]

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


def conversation_checksums(mixture: Mixture) -> npt.NDArray[np.uint32]:
    """(conversations,) uint32, CRC-32 of the messages of each conversation."""
    messages = (json.dumps(conversation["messages"], sort_keys=True) for conversation in mixture)
    return np.fromiter((zlib.crc32(text.encode()) for text in messages), np.uint32, len(mixture))


def fingerprint(mixture: Mixture, checksums: npt.NDArray[np.uint32], **settings: object) -> dict[str, str]:
    """Fingerprint of a mixture: a digest per task by name, a digest of the order, and settings.

    Args:
        checksums: (conversations,) uint32 checksums in the order of the mixture.
        settings: other settings that determine the batches; keys are their names in messages.
    """
    found = {name: str(value) for name, value in settings.items()}
    names = [part.task.name for part in mixture.parts]
    numbers = mixture.part_numbers
    for name in dict.fromkeys(names):
        own = checksums[np.isin(numbers, [number for number, other in enumerate(names) if other == name])]
        own.sort()  # so that other tasks cannot change this digest
        found[name] = f"{len(own):,} conversations {_digest(own)}"
    return {**found, _ORDER: _digest(checksums)}


def check_fingerprint(resumed: Any, current: dict[str, str]) -> None:
    """Raises `UserError` that lists the differences, if there are any."""
    if not isinstance(resumed, dict):
        raise damaged_position("it names no data")
    names = [name for name in {**resumed, **current} if resumed.get(name) != current.get(name)]
    if not names:
        return
    if len(names) > 1 and _ORDER in names:
        names.remove(_ORDER)  # it follows from the others
    changes = "; ".join(f"{name}: {resumed.get(name, 'none')}, now {current.get(name, 'none')}" for name in names)
    raise UserError(
        f"the run to resume was started with different data ({changes}); restore that data, or "
        "start a new run with another --model.tag and --ckpt_path a checkpoint of the stage before"
    )


def _digest(checksums: npt.NDArray[np.uint32]) -> str:
    return hashlib.sha256(np.ascontiguousarray(checksums).data).hexdigest()[:8]
