"""SmolTalk: general conversations (https://huggingface.co/datasets/HuggingFaceTB/smol-smoltalk)."""

from __future__ import annotations

from typing import Any, Literal

from lmchat.tasks.conversation_formats import convert
from lmchat.tasks.rows import HubDataset, RowTask
from lmchat.types import Conversation


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
