"""Renders conversations once to files of tokens and loss masks, which all processes of a node read.

A conversation that a mixture repeats is rendered once; ``index`` has the number of the rendering of each conversation.
"""

from __future__ import annotations

import os
import weakref
import zlib
from array import array
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import numpy.typing as npt

from lmchat.data.mixture import Mixture
from lmchat.files import replacing
from lmchat.progress import ProgressBar
from lmchat.tokenizer.bpe import Tokenizer
from lmchat.tokenizer.render import render_conversation
from lmchat.types import Conversation, UserError

_PIECE = 1 << 16


class Conversations(Protocol):
    """Conversations with random access: a task or a mixture."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Conversation: ...


@dataclass(frozen=True)
class RenderReport:
    """Counts of `render_all`; ``no_loss_tokens`` conversations have none, truncated ones included."""

    conversations: int
    tokens: int
    loss_tokens: int
    truncated: int
    no_loss_tokens: int

    def __str__(self) -> str:
        return (
            f"{self.conversations:,} conversations, {self.tokens:,} tokens, {self.loss_tokens:,} with loss, "
            f"{self.truncated:,} truncated, {self.no_loss_tokens:,} without loss"
        )


_NUMBERS = np.dtype(
    [("start", "i8"), ("lengths", "i4"), ("loss_tokens", "i4"), ("cut_tokens", "i4"), ("checksums", "u4")]
)
"""Numbers of a rendering; it starts at the token ``start``."""


def render_all(
    conversations: Conversations, tokenizer: Tokenizer, max_tokens: int, folder: Path, *, title: str
) -> RenderReport:
    """Renders ``conversations`` into ``folder``, to be opened with `RenderedConversations`.

    Conversations longer than ``max_tokens`` are cut. ``title`` is that of the progress bar.

    Raises:
        UserError: a conversation is malformed (the message has its index), or there is none.
    """
    total = len(conversations)
    if not total:
        raise UserError("there are no conversations; name at least one task that has some")
    folder.mkdir(parents=True, exist_ok=True)
    dtypes = {"tokens": tokenizer.dtype, "mask": np.dtype(bool), "numbers": _NUMBERS, "index": np.dtype(np.uint32)}
    renderings, count, start = array("I", [0]) * total, 0, 0  # renderings by source, from 1; 0 is none yet
    with ExitStack() as stack, ProgressBar(title, total, unit="conversations") as bar:
        tokens, masks, numbers, index = (
            stack.enter_context(_array_file(folder / f"{name}.npy", dtype)) for name, dtype in dtypes.items()
        )
        for position in bar.track(range(total)):
            source = conversations.source(position) if isinstance(conversations, Mixture) else position
            if not renderings[source]:
                count += 1
                renderings[source] = count
                try:
                    ids, mask = render_conversation(tokenizer, conversations[position], None)
                except UserError as error:
                    raise UserError(f"conversation {position}: {error}") from error
                tokens.write(row := np.array(ids[:max_tokens], dtype=tokenizer.dtype).tobytes())
                masks.write(row_mask := bytes(mask[:max_tokens]))
                length, checksum = len(row_mask), zlib.crc32(row_mask, zlib.crc32(row))
                own = (start, length, sum(row_mask), len(ids) - length, checksum)
                numbers.write(np.array(own, dtype=_NUMBERS).tobytes())
                start += length
            index.write(np.uint32(renderings[source] - 1).tobytes())
    return RenderedConversations(folder).report()


@contextmanager
def _array_file(path: Path, dtype: np.dtype) -> Iterator[BinaryIO]:
    """Opens an .npy file for the content of an array of one dimension.

    The file is replaced, not overwritten: a run that has mapped the old one keeps reading it.
    """
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False}
    with replacing(path) as unfinished, unfinished.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {**header, "shape": (0,)})
        start = file.tell()
        yield file
        length = (file.tell() - start) // dtype.itemsize
        file.seek(0)
        np.lib.format.write_array_header_1_0(file, {**header, "shape": (length,)})  # of the same size
        assert file.tell() == start


class RenderedConversations:
    """The conversations that `render_all` wrote.

    They stay on the disk; only `loss_tokens` is kept in memory. The other attributes are gathered at each access.

    Attributes:
        lengths, loss_tokens, cut_tokens: (conversations,) int32, tokens of each; those with loss; those cut off.
        checksums: (conversations,) uint32, CRC-32 of tokens and mask.
    """

    def __init__(self, folder: Path) -> None:
        paths = {name: folder / f"{name}.npy" for name in ("tokens", "mask", "numbers", "index")}
        self._mapped: dict[str, Any] = {name: np.load(path, mmap_mode="r") for name, path in paths.items()}
        self._files = {name: os.open(paths[name], os.O_RDONLY) for name in ("tokens", "mask")}
        for file in self._files.values():
            weakref.finalize(self, os.close, file)

    def _of_each(self, name: str) -> npt.NDArray[Any]:
        """The numbers of all conversations, gathered in pieces, since NumPy copies indices to int64."""
        numbers, index = self._mapped["numbers"][name], self._mapped["index"]
        gathered = np.empty(len(index), numbers.dtype)
        for start in range(0, len(index), _PIECE):
            gathered[start : start + _PIECE] = numbers[index[start : start + _PIECE]]
        return gathered

    @property
    def lengths(self) -> npt.NDArray[np.int32]:
        return self._of_each("lengths")

    @cached_property
    def loss_tokens(self) -> npt.NDArray[np.int32]:
        return self._of_each("loss_tokens")

    @property
    def cut_tokens(self) -> npt.NDArray[np.int32]:
        return self._of_each("cut_tokens")

    @property
    def checksums(self) -> npt.NDArray[np.uint32]:
        return self._of_each("checksums")

    def report(self) -> RenderReport:
        return RenderReport(
            conversations=len(self),
            tokens=int(self.lengths.sum()),
            loss_tokens=int(self.loss_tokens.sum()),
            truncated=int(np.count_nonzero(self.cut_tokens)),
            no_loss_tokens=int((self.loss_tokens == 0).sum()),
        )

    def __len__(self) -> int:
        return len(self._mapped["index"])

    def __getitem__(self, index: int) -> tuple[npt.NDArray[np.unsignedinteger], npt.NDArray[np.bool_]]:
        start, length, *_ = self._mapped["numbers"][self._mapped["index"][index]].tolist()
        return self._read("tokens", start, length), self._read("mask", start, length)

    def _read(self, name: str, start: int, length: int) -> npt.NDArray[Any]:
        """Part of a file; mapped pages would count as memory of the process."""
        array, size = self._mapped[name], self._mapped[name].itemsize
        return np.frombuffer(os.pread(self._files[name], length * size, array.offset + start * size), array.dtype)
