"""Which sequences are decoded together."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from lmchat.generation.sequence import Sequence


class Scheduler:
    """Waiting and running sequences, at most ``max_rows`` of them running.

    Waiting sequences are admitted once no sequence is running.
    """

    def __init__(self, sequences: Iterable[Sequence], max_rows: int) -> None:
        self.waiting = deque(sequences)
        self.running: list[Sequence] = []
        self.max_rows = max_rows

    def admit(self) -> list[Sequence]:
        """Starts and returns the next sequences; empty if some still run or none wait."""
        if self.running:
            return []
        self.running = [self.waiting.popleft() for _ in range(min(self.max_rows, len(self.waiting)))]
        return self.running

    def finished(self) -> list[int]:
        """Indices of the running sequences that are done."""
        return [index for index, sequence in enumerate(self.running) if sequence.done]

    def reorder(self, order: Iterable[int]) -> None:
        """Keeps the running sequences of the given indices, in that order."""
        self.running = [self.running[index] for index in order]
