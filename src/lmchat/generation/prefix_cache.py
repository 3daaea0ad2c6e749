"""Slots of sequences that have ended, kept for prompts that begin alike, such as the next turn of a conversation."""

from __future__ import annotations

from collections.abc import Sequence as Seq

from lmchat.generation.kv_pool import KVPool
from lmchat.generation.sequence import Sequence

MIN_TOKENS = 16
"""Shorter prefixes are read again."""


class PrefixCache:
    """Which slots of the pool hold which tokens, besides those of running sequences; the least recently used go first.

    Args:
        pool: the slots.
    """

    def __init__(self, pool: KVPool) -> None:
        self.pool = pool
        self._tokens: dict[int, tuple[int, ...]] = {}  # by slot, least recently used first

    def __len__(self) -> int:
        return len(self._tokens)

    def clear(self) -> None:
        """Forgets everything: the weights have changed."""
        self._tokens.clear()

    def drop_from(self, num_slots: int) -> None:
        """Forgets the slots from ``num_slots`` on, which cease to exist."""
        self._tokens = {slot: tokens for slot, tokens in self._tokens.items() if slot < num_slots}

    def add(self, slot: int, tokens: tuple[int, ...]) -> None:
        """Keeps a slot that holds ``tokens``."""
        if len(tokens) >= MIN_TOKENS:
            self._tokens[slot] = tokens

    def make_free(self, slot: int, rows: int) -> None:
        """Makes ``slot`` usable. Its contents move to a free slot from ``rows`` + 1 on, or replace the oldest."""
        tokens = self._tokens.pop(slot, None)
        if tokens is None:
            return
        free = (other for other in range(rows + 1, self.pool.num_slots) if other not in self._tokens)
        oldest = next(iter(self._tokens), None)
        target = next(free, oldest)
        if target is None:
            return
        self._tokens.pop(target, None)
        self.pool.copy(slot, target, len(tokens))
        self._tokens[target] = tokens

    def load(self, wanted: Seq[int], row: int, running: Seq[Sequence]) -> int:
        """Puts the longest known prefix of ``wanted`` into slot ``row``, the first that is not running.

        Returns:
            Number of tokens that the slot then holds of ``wanted``.
        """
        slot, length = self._longest(wanted, running)
        if slot is None:
            self.make_free(row, row)
            return 0
        if slot < row:
            self.make_free(row, row)
            self.pool.copy(slot, row, length)
            return length
        tokens = self._tokens.pop(slot)
        if slot != row:
            other = self._tokens.pop(row, None)
            self.pool.swap(row, slot, max(len(tokens), len(other or ())))
            if other is not None:
                self._tokens[slot] = other
        return length

    def _longest(self, wanted: Seq[int], running: Seq[Sequence]) -> tuple[int | None, int]:
        """The slot that holds the longest usable prefix of ``wanted``, and its length."""
        best: int | None = None
        best_length = MIN_TOKENS - 1
        if len(wanted) < MIN_TOKENS:
            return None, 0
        held = [(row, each.prompt, each.num_own) for row, each in enumerate(running) if not each.base]
        held += [(slot, tokens, len(tokens)) for slot, tokens in self._tokens.items()]
        for slot, tokens, count in held:
            if tokens[:MIN_TOKENS] != wanted[:MIN_TOKENS]:
                continue
            length = common_prefix(tokens[:count], wanted)
            length = self.pool.layout.usable_prefix(count, length, self.pool.capacity)
            if length > best_length:
                best, best_length = slot, length
        return best, best_length if best is not None else 0


def common_prefix(a: Seq[int], b: Seq[int]) -> int:
    """Length of the longest common prefix."""
    for index, (left, right) in enumerate(zip(a, b, strict=False)):
        if left != right:
            return index
    return min(len(a), len(b))
