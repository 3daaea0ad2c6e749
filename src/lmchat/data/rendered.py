"""Renders conversations once to files of tokens and loss masks, which all processes of a node memory-map."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

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
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    tokens, masks, cut_tokens, checksums = [], [], [], []
    with ProgressBar(title, len(conversations), unit="conversations") as bar:
        for index in bar.track(range(len(conversations))):
            try:
                ids, mask = render_conversation(tokenizer, conversations[index], None)
            except UserError as error:
                raise UserError(f"conversation {index}: {error}") from error
            cut_tokens.append(max(0, len(ids) - max_tokens))
            tokens.append(np.array(ids[:max_tokens], dtype=dtype))
            masks.append(np.array(mask[:max_tokens], dtype=bool))
            checksums.append(zlib.crc32(masks[-1].tobytes(), zlib.crc32(tokens[-1].tobytes())))
    if not tokens:
        raise UserError("there are no conversations; name at least one task that has some")
    folder.mkdir(parents=True, exist_ok=True)
    lengths = np.array([len(ids) for ids in tokens], dtype=np.int64)
    loss_tokens = np.array([mask.sum() for mask in masks], dtype=np.int64)
    arrays = {
        "tokens": np.concatenate(tokens),
        "mask": np.concatenate(masks),
        "offsets": np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]),
        "supervised": loss_tokens,
        "cut_tokens": np.array(cut_tokens, dtype=np.int64),
        "checksums": np.array(checksums, dtype=np.uint32),
    }
    for name, array in arrays.items():
        # Replaced, not overwritten: a run that has mapped the old file keeps reading it.
        with replacing(folder / f"{name}.npy") as unfinished, unfinished.open("wb") as file:
            np.save(file, array)
    return RenderReport(
        conversations=len(tokens),
        tokens=int(lengths.sum()),
        loss_tokens=int(loss_tokens.sum()),
        truncated=sum(cut > 0 for cut in cut_tokens),
        no_loss_tokens=int((loss_tokens == 0).sum()),
    )


class RenderedConversations:
    """The conversations that `render_all` wrote, in memory-mapped arrays.

    Attributes:
        lengths, loss_tokens, cut_tokens: (conversations,) int64, tokens of each; those with loss; those cut off.
        checksums: (conversations,) uint32, CRC-32 of tokens and mask.
    """

    def __init__(self, folder: Path) -> None:
        self._tokens = np.load(folder / "tokens.npy", mmap_mode="r")
        self._mask = np.load(folder / "mask.npy", mmap_mode="r")
        self._offsets = np.load(folder / "offsets.npy")
        self.loss_tokens: npt.NDArray[np.int64] = np.load(folder / "supervised.npy")
        self.cut_tokens: npt.NDArray[np.int64] = np.load(folder / "cut_tokens.npy")
        self.checksums: npt.NDArray[np.uint32] = np.load(folder / "checksums.npy")
        self.lengths: npt.NDArray[np.int64] = np.diff(self._offsets)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> tuple[npt.NDArray[np.unsignedinteger], npt.NDArray[np.bool_]]:
        span = slice(self._offsets[index], self._offsets[index + 1])
        return self._tokens[span], self._mask[span]
