"""Renders conversations once to files of tokens and loss masks, which all processes of a node memory-map.

A conversation that a mixture repeats is rendered once; ``index`` has the number of the rendering of each conversation.
"""

from __future__ import annotations

import sys
import zlib
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


def render_all(
    conversations: Conversations, tokenizer: Tokenizer, max_tokens: int, folder: Path, *, title: str
) -> RenderReport:
    """Renders ``conversations`` into ``folder``, to be opened with `RenderedConversations`.

    Conversations longer than ``max_tokens`` are cut. ``title`` is that of the progress bar.

    Raises:
        UserError: a conversation is malformed (the message has its index), or there is none.
    """
    dtypes = {
        "tokens": np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32),
        "mask": np.dtype(bool),
        "index": np.dtype(np.int64),
        "offsets": np.dtype(np.int64),
        "supervised": np.dtype(np.int64),
        "cut_tokens": np.dtype(np.int64),
        "checksums": np.dtype(np.uint32),
    }
    if not len(conversations):
        raise UserError("there are no conversations; name at least one task that has some")
    chosen, index = _without_repetitions(conversations)
    folder.mkdir(parents=True, exist_ok=True)
    tokens = 0
    with ExitStack() as stack, ProgressBar(title, len(chosen), unit="conversations") as bar:
        files = {
            name: stack.enter_context(_array_file(folder / f"{name}.npy", dtype)) for name, dtype in dtypes.items()
        }
        files["index"].write(index.tobytes())
        files["offsets"].write(np.int64(0).tobytes())
        for position in bar.track(map(int, chosen)):
            try:
                ids, mask = render_conversation(tokenizer, conversations[position], None)
            except UserError as error:
                raise UserError(f"conversation {position}: {error}") from error
            cut = max(0, len(ids) - max_tokens)
            tokens += len(ids) - cut
            row = np.array(ids[:max_tokens], dtype=dtypes["tokens"]).tobytes()
            files["tokens"].write(row)
            files["mask"].write(row_mask := bytes(mask[:max_tokens]))
            checksum = zlib.crc32(row_mask, zlib.crc32(row))
            numbers = {"offsets": tokens, "supervised": sum(row_mask), "cut_tokens": cut, "checksums": checksum}
            for name, number in numbers.items():
                files[name].write(number.to_bytes(dtypes[name].itemsize, sys.byteorder))
    return RenderedConversations(folder).report()


def _without_repetitions(conversations: Conversations) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Indices of the conversations to render, and for all conversations their places among those."""
    positions = np.arange(len(conversations))
    firsts = conversations.first_indices() if isinstance(conversations, Mixture) else positions
    is_first = firsts == positions
    return positions[is_first], (np.cumsum(is_first) - 1)[firsts]


@contextmanager
def _array_file(path: Path, dtype: np.dtype) -> Iterator[BinaryIO]:
    """Opens an .npy file for the content of an array of one dimension.

    The file is replaced, not overwritten: a run that has mapped the old one keeps reading it.
    """
    header = {"descr": dtype.str, "fortran_order": False}
    with replacing(path) as unfinished, unfinished.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {**header, "shape": (0,)})
        start = file.tell()
        yield file
        length = (file.tell() - start) // dtype.itemsize
        file.seek(0)
        np.lib.format.write_array_header_1_0(file, {**header, "shape": (length,)})  # of the same size
        assert file.tell() == start


class RenderedConversations:
    """The conversations that `render_all` wrote, in memory-mapped arrays.

    Attributes:
        lengths, loss_tokens, cut_tokens: (conversations,) int64, tokens of each; those with loss; those cut off.
        checksums: (conversations,) uint32, CRC-32 of tokens and mask.
    """

    def __init__(self, folder: Path) -> None:
        names = ("index", "offsets", "tokens", "mask", "supervised", "cut_tokens", "checksums")
        self._mapped: dict[str, Any] = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in names}

    def _of_each(self, numbers: npt.NDArray[Any]) -> Any:
        return numbers[self._mapped["index"]]

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        return self._of_each(np.diff(np.asarray(self._mapped["offsets"])))

    @cached_property
    def loss_tokens(self) -> npt.NDArray[np.int64]:
        return self._of_each(self._mapped["supervised"])

    @cached_property
    def cut_tokens(self) -> npt.NDArray[np.int64]:
        return self._of_each(self._mapped["cut_tokens"])

    @cached_property
    def checksums(self) -> npt.NDArray[np.uint32]:
        return self._of_each(self._mapped["checksums"])

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
        number, offsets = self._mapped["index"][index], self._mapped["offsets"]
        span = slice(offsets[number], offsets[number + 1])
        return self._mapped["tokens"][span], self._mapped["mask"][span]
