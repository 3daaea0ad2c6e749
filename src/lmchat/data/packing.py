"""Best-fit packing of documents into rows, by their lengths only. Pretraining crops, fine-tuning pads."""

from bisect import bisect_left
from collections import deque
from collections.abc import Iterator
from itertools import islice
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from lmchat.option_checks import check_count, count_in, damaged_position
from lmchat.types import UserError

PackedRow = list[tuple[int, int]]
"""Segments of a row in order: (document, number of tokens). They are the first of the document, but where a row
continues a document, see `BestFitPacker.start`."""

# A buffered document is one integer: its length in the high bits, its complemented arrival number in the low bits. In
# sorted order, the last integer under a bound is the longest document that fits, the earliest among equals.
_ARRIVAL_BITS = 36
_LAST_ARRIVAL = (1 << _ARRIVAL_BITS) - 1
_LONGEST = (1 << (62 - _ARRIVAL_BITS)) - 1

_READ_AHEAD = 1024


class BestFitPacker(Iterator[PackedRow]):
    """Packs documents, read in order and repeatedly, into rows of ``row_tokens`` tokens; the algorithm is nanochat's.

    Before each placement the buffer is refilled, ``refill`` documents at a time, to at least ``buffer_size``. The
    longest document that fits entirely is placed, the earliest among equals. If none fits, ``crop`` fills the row with
    the beginning of the shortest document and discards the rest; ``split`` fills it with the beginning of the first
    document that is longer than a row (of the longest if there is none), which the next rows begin with, so that a few
    long documents are read in turn; ``pad`` ends the row. ``crop`` crops documents longer than a row, ``pad``
    raises `UserError` for them. Empty documents always raise.

    A row that continues a document begins with the last token of the row before, so that each token is a target once.

    With ``epochs``, ``pad`` places every document exactly once per epoch, the others stop when the buffer cannot be
    refilled. Buffered documents are part of ``state`` (nanochat loses them when training stops).

    Args:
        lengths: (documents,) document lengths in tokens, including BOS.
        row_tokens: capacity of a row; sequence length + 1 if targets are the inputs shifted by one.
        buffer_size: documents to choose from.
        refill: documents added to the buffer at a time.
        policy: what happens when no document fits.
        epochs: passes over the documents; None is unlimited.

    Attributes:
        start: first token of the last row's first segment within its document; 0 unless the row continues a document.

    Raises:
        UserError: an argument is out of range, or there are no documents.
    """

    def __init__(
        self,
        lengths: npt.NDArray[np.integer[Any]],
        *,
        row_tokens: int,
        buffer_size: int = 1000,
        refill: int = 128,
        policy: Literal["crop", "split", "pad"] = "crop",
        epochs: int | None = None,
    ) -> None:
        check_count(None, 2 if policy == "split" else 1, row_tokens=row_tokens)
        check_count(None, 1, buffer_size=buffer_size, refill=refill, epochs=epochs)
        if len(lengths) == 0:
            raise UserError("there are no documents to pack; give text or conversations with at least one")
        self.lengths = lengths
        self.row_tokens = row_tokens
        self.buffer_size = buffer_size
        self.refill = refill
        self.policy = policy
        self._end = _LAST_ARRIVAL if epochs is None else epochs * len(lengths)
        # Arrivals are counted over all epochs: document = arrival mod number of documents.
        self._next = 0
        self._keys: list[int] = []
        # With "split", the buffered documents longer than a row, in order of arrival. Only `_to_cut` takes them.
        self._long = deque[int]()
        self._upcoming = self._keys_from(0)
        self.start = 0
        # Arrival and next token of the document that the next row continues.
        self._cut: tuple[int, int] | None = None

    @property
    def placed(self) -> int:
        """Documents placed in rows so far, over all epochs."""
        return self._next - len(self._keys)

    def __next__(self) -> PackedRow:
        keys, documents, pad = self._keys, len(self.lengths), self.policy == "pad"
        row, room = self._continued()
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
                key, taken = keys.pop(self._to_cut()), room
                if self.policy == "split":
                    self._cut = (_LAST_ARRIVAL - (key & _LAST_ARRIVAL), taken)
            row.append(((_LAST_ARRIVAL - (key & _LAST_ARRIVAL)) % documents, taken))
            room -= taken
        if not row or (room and not pad):
            raise StopIteration
        return row

    def _continued(self) -> tuple[PackedRow, int]:
        """The first segment of the next row if it continues a cut document, and the room that is left in the row."""
        if self._cut is None:
            self.start = 0
            return [], self.row_tokens
        arrival, position = self._cut
        document = arrival % len(self.lengths)
        length = int(self.lengths[document])
        self.start = position - 1
        taken = min(self.row_tokens, length - self.start)
        self._cut = (arrival, self.start + taken) if self.start + taken < length else None
        return [(document, taken)], self.row_tokens - taken

    def _to_cut(self) -> int:
        """Index of the document that fills a row when none fits, see `BestFitPacker`."""
        if self.policy == "crop":
            return bisect_left(self._keys, ((self._keys[0] >> _ARRIVAL_BITS) + 1) << _ARRIVAL_BITS) - 1
        return bisect_left(self._keys, self._long.popleft()) if self._long else -1

    def _top_up(self) -> bool:
        """Refills the buffer; returns whether it has ``buffer_size`` documents."""
        keys = self._keys
        while len(keys) < self.buffer_size and (entering := list(islice(self._upcoming, self.refill))):
            keys += entering
            self._long.extend(self._too_long(entering))
            self._next += len(entering)
        keys.sort()
        return len(keys) >= self.buffer_size

    def _too_long(self, keys: list[int]) -> list[int]:
        """With ``split``, the documents that are longer than a row."""
        return [key for key in keys if key >> _ARRIVAL_BITS > self.row_tokens] if self.policy == "split" else []

    def _keys_from(self, arrival: int) -> Iterator[int]:
        """Yields the keys of documents, converted many at a time: one by one would take longer than packing."""
        while arrival < self._end:
            first = arrival % len(self.lengths)
            lengths = self.lengths[first : first + min(_READ_AHEAD, self._end - arrival)]
            yield from self._to_keys(lengths, np.arange(arrival, arrival + len(lengths)))
            arrival += len(lengths)

    def _to_keys(self, lengths: npt.NDArray[np.integer], arrivals: npt.NDArray[np.int64]) -> list[int]:
        lengths = lengths.astype(np.int64)
        if lengths.min() < 1:
            worst = int(lengths.argmin())
            raise UserError(
                f"document {arrivals[worst] % len(self.lengths)} has {lengths[worst]} tokens; it must have at least 1: "
                "leave out empty documents"
            )
        if self.policy == "pad" and lengths.max() > self.row_tokens:
            worst = int(lengths.argmax())
            raise UserError(
                f"document {arrivals[worst] % len(self.lengths)} has {lengths[worst]} tokens, but a row has "
                f"{self.row_tokens}; truncate it first"
            )
        # No row is longer than _LONGEST.
        return (np.minimum(lengths, _LONGEST) << _ARRIVAL_BITS | _LAST_ARRIVAL - arrivals).tolist()

    def state(self) -> dict[str, Any]:
        """The exact position between two rows, about 8 bytes per buffered document.

        Returns:
            ``next``: number of documents that have entered the buffer, over all epochs. ``buffer``: (n,) int64, those
            still in it, in order of arrival. ``cut``, with ``split``: (2,) int64, arrival and next token of the
            document that the next row continues, if any.
        """
        arrivals = _LAST_ARRIVAL - (np.array(self._keys, dtype=np.int64) & _LAST_ARRIVAL)
        cut = {} if self._cut is None else {"cut": list(self._cut)}
        return {"next": self._next, "buffer": np.sort(arrivals), **cut}

    def restore(self, state: dict[str, Any]) -> None:
        """Continues from a `state` on the same lengths; its buffer may be any sequence of ints.

        Raises:
            UserError: it is not the state of a packer.
        """
        self._next = count_in(state, "next", self._end)
        self._upcoming = self._keys_from(self._next)
        arrivals = self._checked_buffer(state.get("buffer"))
        self._cut = self._checked_cut(state["cut"], arrivals) if "cut" in state else None
        lengths = self.lengths[arrivals % len(self.lengths)]
        keys = self._to_keys(lengths, arrivals) if len(arrivals) else []
        self._keys, self._long = sorted(keys), deque(self._too_long(keys))

    def _checked_buffer(self, buffer: Any) -> npt.NDArray[np.int64]:
        """Arrivals of buffered documents: increasing, and before the next one."""
        try:
            arrivals = np.asarray(buffer)
        except (ValueError, TypeError, RuntimeError) as error:
            raise damaged_position(f"the buffer is not an array: {error}") from error
        if arrivals.ndim != 1 or (len(arrivals) and arrivals.dtype.kind not in "iu"):
            raise damaged_position("the buffer is not a list of integers")
        arrivals = arrivals.astype(np.int64)
        if (np.diff(arrivals) <= 0).any() or (len(arrivals) and not 0 <= arrivals[0] <= arrivals[-1] < self._next):
            raise damaged_position("the buffer has documents that cannot be in it")
        return arrivals

    def _checked_cut(self, cut: Any, arrivals: npt.NDArray[np.int64]) -> tuple[int, int]:
        """Arrival and next token of a document that has entered, is not in the buffer and has tokens left."""
        match cut:
            case [int(arrival), int(position)] if (
                bool not in map(type, cut) and 0 <= arrival < self._next and arrival not in arrivals
            ):
                if 1 <= position < self.lengths[arrival % len(self.lengths)]:
                    return arrival, position
        raise damaged_position("the document to continue has not been placed, or has no such token")
