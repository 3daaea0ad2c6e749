"""Renders conversations once to files of tokens and loss masks, which all processes of a node read.

Each file is the content of an array: ``tokens``, uint32; numbers of the ``renderings``; and ``index``, uint32, the
rendering of each conversation, since one that a mixture repeats is rendered once.
"""

import os
import weakref
import zlib
from array import array
from collections.abc import Sequence
from contextlib import ExitStack
from functools import cached_property
from operator import methodcaller
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lmchat.data.mixture import Mixture
from lmchat.files import replacing
from lmchat.progress import ProgressBar
from lmchat.tasks.base import Task
from lmchat.tokenizer.bpe import Tokenizer
from lmchat.tokenizer.render import render_conversation
from lmchat.types import Conversation, UserError

_PIECE = 1 << 16
_LOSS = 1 << 31
"""Added to the ids of tokens with loss."""
_RENDERING = np.dtype(
    [("start", "i8"), ("lengths", "i4"), ("loss_tokens", "i4"), ("cut_tokens", "i4"), ("checksums", "u4")]
)
"""Numbers of a rendering; its first token is ``start``."""


class RenderedConversations:
    """The conversations that `render_all` wrote.

    They stay on the disk; only `loss_tokens` is kept in memory. The other attributes are gathered at each access.

    Attributes:
        lengths, loss_tokens, cut_tokens: (conversations,) int32, tokens of each; those with loss; those cut off.
        checksums: (conversations,) uint32, CRC-32 of tokens and mask.
    """

    def __init__(self, folder: Path) -> None:
        self._renderings = np.memmap(folder / "renderings", _RENDERING, "r")
        self._index = np.memmap(folder / "index", np.uint32, "r")
        self._tokens = os.open(folder / "tokens", os.O_RDONLY)  # mapped pages would count as memory of the process
        weakref.finalize(self, os.close, self._tokens)

    def _of_each(self, name: str) -> npt.NDArray[Any]:
        """The numbers of all conversations, gathered in pieces, since NumPy copies indices to int64."""
        numbers = self._renderings[name]
        gathered = np.empty(len(self), numbers.dtype)
        for start in range(0, len(self), _PIECE):
            gathered[start : start + _PIECE] = numbers[self._index[start : start + _PIECE]]
        return gathered

    lengths = property(methodcaller("_of_each", "lengths"))
    loss_tokens = cached_property(methodcaller("_of_each", "loss_tokens"))
    cut_tokens = property(methodcaller("_of_each", "cut_tokens"))
    checksums = property(methodcaller("_of_each", "checksums"))

    def __str__(self) -> str:
        return (
            f"{len(self):,} conversations, {self.lengths.sum():,} tokens, {self.loss_tokens.sum():,} with loss, "
            f"{(self.cut_tokens > 0).sum():,} truncated, {(self.loss_tokens == 0).sum():,} without loss"
        )

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: int) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.bool_]]:
        """(tokens,) ids and loss mask of a conversation."""
        start, length, *_ = self._renderings[self._index[index]].tolist()
        tokens = np.frombuffer(os.pread(self._tokens, 4 * length, 4 * start), np.uint32)
        return tokens & np.uint32(_LOSS - 1), tokens >= _LOSS


def render_all(
    conversations: Mixture | Task | Sequence[Conversation],
    tokenizer: Tokenizer,
    max_tokens: int,
    folder: Path,
    *,
    title: str,
) -> RenderedConversations:
    """Renders ``conversations`` into ``folder``, and opens them.

    Conversations longer than ``max_tokens`` are cut. ``title`` is that of the progress bar.

    Raises:
        UserError: a conversation is malformed (the message has its index), or there is none.
    """
    total = len(conversations)
    if not total:
        raise UserError("there are no conversations; name at least one task that has some")
    folder.mkdir(parents=True, exist_ok=True)
    rendered, count, start = array("I", [0]) * total, 0, 0  # renderings by source, from 1; 0 is none yet
    with ExitStack() as stack, ProgressBar(title, total, unit="conversations") as bar:
        # Files are replaced, not overwritten: a run that has opened the old ones keeps reading them.
        unfinished = [stack.enter_context(replacing(folder / name)) for name in ("tokens", "renderings", "index")]
        tokens, renderings, index = (stack.enter_context(path.open("wb")) for path in unfinished)
        for position in bar.track(range(total)):
            source = conversations.source(position) if isinstance(conversations, Mixture) else position
            if not rendered[source]:
                count += 1
                rendered[source] = count
                try:
                    ids, mask = render_conversation(tokenizer, conversations[position], None)
                except UserError as error:
                    raise UserError(f"conversation {position}: {error}") from error
                row, learned = np.array(ids[:max_tokens], tokenizer.dtype), np.array(mask[:max_tokens], bool)
                tokens.write((row + learned * np.uint32(_LOSS)).tobytes())
                length, checksum = len(row), zlib.crc32(learned.tobytes(), zlib.crc32(row.tobytes()))
                own = (start, length, int(learned.sum()), len(ids) - length, checksum)
                renderings.write(np.array(own, _RENDERING).tobytes())
                start += length
            index.write(np.uint32(rendered[source] - 1).tobytes())
    return RenderedConversations(folder)
