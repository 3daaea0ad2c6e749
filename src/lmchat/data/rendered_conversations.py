"""Renders conversations once to files of tokens and loss masks, which all processes of a node memory-map."""

from __future__ import annotations

import sys
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import numpy.typing as npt

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
        "offsets": np.dtype(np.int64),
        "supervised": np.dtype(np.int64),
        "cut_tokens": np.dtype(np.int64),
        "checksums": np.dtype(np.uint32),
    }
    if not len(conversations):
        raise UserError("there are no conversations; name at least one task that has some")
    folder.mkdir(parents=True, exist_ok=True)
    tokens = loss_tokens = truncated = no_loss_tokens = 0
    with ExitStack() as stack, ProgressBar(title, len(conversations), unit="conversations") as bar:
        files = {
            name: stack.enter_context(_array_file(folder / f"{name}.npy", dtype)) for name, dtype in dtypes.items()
        }
        files["offsets"].write(np.int64(0).tobytes())
        for index in bar.track(range(len(conversations))):
            try:
                ids, mask = render_conversation(tokenizer, conversations[index], None)
            except UserError as error:
                raise UserError(f"conversation {index}: {error}") from error
            cut = max(0, len(ids) - max_tokens)
            tokens += len(ids) - cut
            loss_tokens += (with_loss := sum(mask[:max_tokens]))
            truncated += cut > 0
            no_loss_tokens += with_loss == 0
            row = np.array(ids[:max_tokens], dtype=dtypes["tokens"]).tobytes()
            files["tokens"].write(row)
            files["mask"].write(row_mask := bytes(mask[:max_tokens]))
            checksum = zlib.crc32(row_mask, zlib.crc32(row))
            numbers = {"offsets": tokens, "supervised": with_loss, "cut_tokens": cut, "checksums": checksum}
            for name, number in numbers.items():
                files[name].write(number.to_bytes(dtypes[name].itemsize, sys.byteorder))
    return RenderReport(len(conversations), tokens, loss_tokens, truncated, no_loss_tokens)


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
        def mapped(name: str) -> Any:
            return np.load(folder / f"{name}.npy", mmap_mode="r")

        self._tokens, self._mask, self._offsets = mapped("tokens"), mapped("mask"), mapped("offsets")
        self.loss_tokens: npt.NDArray[np.int64] = mapped("supervised")
        self.cut_tokens: npt.NDArray[np.int64] = mapped("cut_tokens")
        self.checksums: npt.NDArray[np.uint32] = mapped("checksums")
        self.lengths: npt.NDArray[np.int64] = np.diff(np.asarray(self._offsets))

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> tuple[npt.NDArray[np.unsignedinteger], npt.NDArray[np.bool_]]:
        span = slice(self._offsets[index], self._offsets[index + 1])
        return self._tokens[span], self._mask[span]
