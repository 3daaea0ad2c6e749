"""Keeps slots of finished sequences for prompts with the same prefix, such as the next turn of a conversation."""

from collections.abc import Sequence as Seq
from typing import NamedTuple

from lmchat.generation.kv_pool import KVPool
from lmchat.generation.sequence import Sequence

MIN_TOKENS = 16
"""Minimum length of a reused prefix."""


class Held(NamedTuple):
    """Contents of a cached slot.

    Attributes:
        tokens: tokens whose keys and values it has.
        written: number of tokens ever written to it; layers with a short window lack those that were overwritten.
    """

    tokens: tuple[int, ...]
    written: int


class PrefixCache:
    """Cached slots of a pool and their tokens, evicted in LRU order."""

    def __init__(self, pool: KVPool) -> None:
        self.pool = pool
        self._held: dict[int, Held] = {}  # by slot, least recently used first

    def __len__(self) -> int:
        return len(self._held)

    def clear(self) -> None:
        """Removes everything; call it when the weights have changed."""
        self._held.clear()

    def drop_from(self, num_slots: int) -> None:
        """Removes the slots from ``num_slots`` on."""
        self._held = {slot: held for slot, held in self._held.items() if slot < num_slots}

    def add(self, slot: int, tokens: tuple[int, ...], written: int) -> None:
        """Keeps a slot; see `Held`."""
        if len(tokens) >= MIN_TOKENS:
            self._held[slot] = Held(tokens, written)

    def vacate(self, start: int, end: int) -> None:
        """Frees slots ``start`` to ``end`` - 1. Their contents move to free slots from ``end`` on, or replace the
        oldest there."""
        for slot in [slot for slot in self._held if start <= slot < end]:
            held = self._held.pop(slot)
            free = (other for other in range(end, self.pool.num_slots) if other not in self._held)
            oldest = next((other for other in self._held if other >= end), None)
            target = next(free, oldest)
            if target is not None:
                self._held.pop(target, None)
                self.pool.copy(slot, target, len(held.tokens))
                self._held[target] = held

    def load(self, wanted: Seq[int], row: int, running: Seq[Sequence]) -> tuple[int, int]:
        """Loads the longest cached prefix of ``wanted`` into slot ``row``, the first one that is not running.

        Returns:
            Length of that prefix, and number of tokens ever written to the slot; see `Held`.
        """
        slot, length, written = self._longest(wanted, running)
        if slot is None:
            self.vacate(row, row + 1)
            return 0, 0
        if slot < row:
            self.vacate(row, row + 1)
            self.pool.copy(slot, row, length)
            return length, written
        tokens = self._held.pop(slot).tokens
        if slot != row:
            other = self._held.pop(row, None)
            self.pool.swap(row, slot, max(len(tokens), len(other.tokens) if other else 0))
            if other is not None:
                self._held[slot] = other
        return length, written

    def _longest(self, wanted: Seq[int], running: Seq[Sequence]) -> tuple[int | None, int, int]:
        """The slot with the longest usable prefix of ``wanted``, its length, and `Held.written` of the slot."""
        best: tuple[int | None, int, int] = None, MIN_TOKENS - 1, 0
        if len(wanted) < MIN_TOKENS:
            return None, 0, 0
        known = [
            (row, each.prompt[: each.num_own], each.written) for row, each in enumerate(running) if not each.shared
        ]
        known += [(slot, *held) for slot, held in self._held.items()]
        for slot, tokens, written in known:
            if tokens[:MIN_TOKENS] != wanted[:MIN_TOKENS]:
                continue
            length = _common_prefix(tokens, wanted)
            length = self.pool.layout.usable_prefix(written, length, self.pool.capacity)
            if length > best[1]:
                best = slot, length, written
        return best


def _common_prefix(a: Seq[int], b: Seq[int]) -> int:
    pairs = enumerate(zip(a, b, strict=False))
    return next((index for index, (left, right) in pairs if left != right), min(len(a), len(b)))
