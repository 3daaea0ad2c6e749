"""Recorded conversations: from files, and SmolTalk's."""

from __future__ import annotations

import hashlib
import json
import warnings
from array import array
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lmchat.tasks.conversation_formats import FORMATS, Format, convert
from lmchat.tasks.rows import HubDataset, RowTask
from lmchat.types import Conversation, UserError


class JSONLConversations(RowTask):
    """Conversations from files, in any format of `lmchat.tasks.conversation_formats`.

    Malformed records are left out with a warning that counts and lists them. `notes` lists what was mapped.

    Args:
        path: a file of `lmchat.tasks.row_files.SUFFIXES`, or a folder of such files.
        shuffle_seed: seed of the order; null keeps the order of the file.
        skip_malformed: leave out malformed records with a warning, instead of raising an error.
        format: format of the records; null detects it by their fields.
        split: train or val; null is all. Equal conversations are in the same split, in any order.
        val_fraction: share of the conversations in the val split.
        options: see `RowTask`.

    Raises:
        UserError: an option is out of range.
    """

    def __init__(
        self,
        path: str,
        shuffle_seed: int | None = None,
        skip_malformed: bool = True,
        format: Format | None = None,
        split: Literal["train", "val"] | None = None,
        val_fraction: float = 0.05,
        **options: Any,
    ) -> None:
        super().__init__(hub=None, path=path, shuffle_seed=shuffle_seed, skip_malformed=skip_malformed, **options)
        if format not in (None, *FORMATS):
            raise UserError(f"JSONLConversations: format is {format}; use {', '.join(FORMATS)}, or null")
        if not 0 < val_fraction < 1:
            raise UserError(f"JSONLConversations: val_fraction is {val_fraction}; use a number between 0 and 1")
        self.format = format
        self.split = split
        self.val_fraction = val_fraction
        self._counts: Counter[str] = Counter()
        self._digests = array("Q")

    @property
    def name(self) -> str:
        split = f"/{self.split}" if self.split else ""
        return f"{super().name}/{Path(str(self.path)).name.split('.')[0]}{split}"

    def conversation(self, row: Any) -> Conversation:
        return convert(row, self.format).conversation

    def check(self, row: Any) -> None:
        converted = convert(row, self.format)
        self._counts.update([f"records of the format {converted.format}", *converted.notes])
        text = json.dumps(converted.conversation, sort_keys=True)
        digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
        self._digests.append(int.from_bytes(digest[:8]))

    def share_rows(self, other: JSONLConversations) -> None:
        """Takes the rows of ``other``, a task of the same files, so that they are read and checked once for both."""
        self.rows, self._checked = other.rows, other._checked
        self._counts, self._digests = other._counts, other._digests

    def chosen(self) -> np.ndarray:
        good = super().chosen()
        if self.split is None:
            return good
        return good[self._is_held_out() == (self.split == "val")]

    def _is_held_out(self) -> np.ndarray:
        """(valid rows,) bool: the conversations with the smallest digests, at most the share wanted, but at least one.

        If all conversations are equal, that conversation is in both splits.
        """
        digests = np.asarray(self._digests)
        smallest = digests.min()
        if smallest == digests.max():
            warnings.warn(
                f"{self.path}: all conversations are equal, so the validation data is also trained on", stacklevel=2
            )
            return np.full(len(digests), self.split == "val")
        count = int(self.val_fraction * len(digests))
        return digests < max(np.partition(digests, count)[count], smallest + 1)

    def notes(self) -> list[str]:
        """What was mapped or left out, with the number of records; empty if nothing was."""
        read, rows = len(self._checked), len(self.rows)
        if read == rows and set(self._counts) == {"records of the format messages"}:
            return list(self.rows.notes)
        notes = [*self.rows.notes, f"{self.path}: {read:,} of {rows:,} records read"]
        notes += [f"{self.path}: {count:,} × {what}" for what, count in sorted(self._counts.items())]
        return [note if note.isprintable() else ascii(note) for note in notes]


class SmolTalk(RowTask):
    """The small variant of SmolTalk: 460 K conversations to train on, 24 K to test.

    Args:
        split: part of the dataset.
        options: see `RowTask`.
    """

    def __init__(self, split: Literal["train", "test"] = "train", **options: Any) -> None:
        super().__init__(hub=HubDataset("HuggingFaceTB/smol-smoltalk", None, split), **options)

    def conversation(self, row: Any) -> Conversation:
        return convert(row, "messages").conversation
