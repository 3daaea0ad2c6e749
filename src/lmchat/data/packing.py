"""Best-fit packing of documents into rows, by their lengths only.

The packer needs no tokens, so every rank can pack the whole stream and keep its own rows: the global sequence of rows
is the same for any number of ranks. Pretraining crops, fine-tuning pads.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from typing import Any, Literal, Protocol, overload

import numpy as np
import numpy.typing as npt

from lmchat.option_checks import check_count
from lmchat.types import UserError

PackedRow = list[tuple[int, int]]
"""Segments of a row in order: (document, number of tokens from its beginning)."""

# A buffered document is one integer: its length in the high bits, its complemented arrival number in the low bits. In
# sorted order, the last integer under a bound is the longest document that fits, the earliest among equals.
_ARRIVAL_BITS = 36
_LAST_ARRIVAL = (1 << _ARRIVAL_BITS) - 1
_LONGEST = (1 << (62 - _ARRIVAL_BITS)) - 1


class Lengths(Protocol):
    """Document lengths in tokens, including BOS: an int array, or a view of one on disk."""

    def __len__(self) -> int: ...
    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> npt.NDArray[np.integer]: ...


class BestFitPacker(Iterator[PackedRow]):
    """Packs documents, read in order and repeatedly, into rows of ``row_tokens`` tokens; the algorithm is nanochat's.

    Before each placement the buffer is refilled, ``refill`` documents at a time, to at least ``buffer_size``. The
    longest document that fits entirely is placed, the earliest among equals. If none fits, ``crop`` fills the row with
    the beginning of the shortest document and discards the rest; ``pad`` ends the row. ``crop`` crops documents longer
    than a row, ``pad`` raises `UserError` for them. Empty documents always raise.

    With ``epochs``, ``pad`` places every document exactly once per epoch, and ``crop`` stops when the buffer cannot be
    refilled. Buffered documents are part of ``state`` (nanochat loses them when training stops).

    Args:
        lengths: document lengths in tokens.
        row_tokens: capacity of a row; sequence length + 1 if targets are the inputs shifted by one.
        buffer_size: documents to choose from.
        refill: documents added to the buffer at a time.
        policy: what happens when no document fits.
        epochs: passes over the documents; None is unlimited.

    Raises:
        UserError: an argument is out of range, or there are no documents.
    """

    def __init__(
        self,
        lengths: Lengths,
        *,
        row_tokens: int,
        buffer_size: int = 1000,
        refill: int = 128,
        policy: Literal["crop", "pad"] = "crop",
        epochs: int | None = None,
    ) -> None:
        check_count(None, 1, row_tokens=row_tokens, buffer_size=buffer_size, refill=refill, epochs=epochs)
        if len(lengths) == 0:
            raise UserError("there are no documents to pack")
        self.lengths = lengths
        self.row_tokens = row_tokens
        self.buffer_size = buffer_size
        self.refill = refill
        self.policy = policy
        self._end = _LAST_ARRIVAL if epochs is None else epochs * len(lengths)
        # Arrivals are counted over all epochs: document = arrival mod number of documents.
        self._next = 0
        self._keys: list[int] = []

    @property
    def placed(self) -> int:
        """Documents placed in rows so far, over all epochs."""
        return self._next - len(self._keys)

    def __next__(self) -> PackedRow:
        keys, documents, pad = self._keys, len(self.lengths), self.policy == "pad"
        row: PackedRow = []
        room = self.row_tokens
        while room:
            if len(keys) < self.buffer_size and not self._top_up() and not (pad and keys):
                break
            fit = bisect_left(keys, (room + 1) << _ARRIVAL_BITS) - 1
            if fit >= 0:
                key = keys.pop(fit)
                taken = key >> _ARRIVAL_BITS
            elif pad:
                break
            else:
                key = keys.pop(self._shortest())
                taken = room
            row.append(((_LAST_ARRIVAL - (key & _LAST_ARRIVAL)) % documents, taken))
            room -= taken
        if not row or (room and not pad):
            raise StopIteration
        return row

    def _shortest(self) -> int:
        length = self._keys[0] >> _ARRIVAL_BITS
        return bisect_left(self._keys, (length + 1) << _ARRIVAL_BITS) - 1

    def _top_up(self) -> bool:
        """Refills the buffer; returns whether it holds ``buffer_size`` documents."""
        keys, documents = self._keys, len(self.lengths)
        while len(keys) < self.buffer_size and self._next < self._end:
            stop = min(self._next + self.refill, self._end)
            while self._next < stop:
                first = self._next % documents
                count = min(stop - self._next, documents - first)
                lengths = self.lengths[first : first + count]
                keys += self._to_keys(lengths, np.arange(self._next, self._next + count))
                self._next += count
        keys.sort()
        return len(keys) >= self.buffer_size

    def _to_keys(self, lengths: npt.NDArray[np.integer], arrivals: npt.NDArray[np.int64]) -> list[int]:
        lengths = lengths.astype(np.int64)
        if lengths.min() < 1:
            worst = int(lengths.argmin())
            raise UserError(
                f"document {arrivals[worst] % len(self.lengths)} has {lengths[worst]} tokens; it must have at least 1"
            )
        if self.policy == "pad" and lengths.max() > self.row_tokens:
            worst = int(lengths.argmax())
            raise UserError(
                f"document {arrivals[worst] % len(self.lengths)} has {lengths[worst]} tokens, a row holds "
                f"{self.row_tokens}; truncate it first"
            )
        # No row is longer than _LONGEST.
        return (np.minimum(lengths, _LONGEST) << _ARRIVAL_BITS | _LAST_ARRIVAL - arrivals).tolist()

    def state(self) -> dict[str, Any]:
        """The exact position between two rows, about 8 bytes per buffered document.

        Returns:
            ``next``: number of documents that have entered the buffer, over all epochs. ``buffer``: (n,) int64, those
            still in it, in order of arrival.
        """
        arrivals = _LAST_ARRIVAL - (np.array(self._keys, dtype=np.int64) & _LAST_ARRIVAL)
        return {"next": self._next, "buffer": np.sort(arrivals)}

    def restore(self, state: dict[str, Any]) -> None:
        """Continues from a `state` on the same lengths; its buffer may be any sequence of ints."""
        self._next = int(state["next"])
        arrivals = np.asarray(state["buffer"], dtype=np.int64)
        lengths = np.array([self.lengths[int(d)] for d in arrivals % len(self.lengths)], dtype=np.int64)
        self._keys = sorted(self._to_keys(lengths, arrivals)) if len(arrivals) else []
