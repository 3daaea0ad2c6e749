"""Conversations from files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lmchat.messages import check_messages
from lmchat.tasks.rows import MalformedRow, RowTask, checked_text, field
from lmchat.types import Conversation, Message, UserError


def parse_messages(messages: list[Any]) -> Conversation:
    """``messages`` as a conversation to learn from; other fields of the messages and parts are left out.

    Raises:
        MalformedRow: they break a rule of `lmchat.messages.check_messages`, there is no assistant message, or UTF-8
            cannot hold their text.
    """
    try:
        check_messages(messages)
    except UserError as error:
        raise MalformedRow(str(error)) from None
    if len(messages) - (messages[0]["role"] == "system") < 2:
        raise MalformedRow("there is no assistant message to learn from")
    return {"messages": [_message(message, f"message {index}") for index, message in enumerate(messages)]}


def _message(message: Any, what: str) -> Message:
    content = message["content"]
    if isinstance(content, list):
        content = [{"type": part["type"], "text": part["text"]} for part in content]
    checked_text(content if isinstance(content, str) else "".join(part["text"] for part in content), what)
    return {"role": message["role"], "content": content}


class JSONLConversations(RowTask):
    """Conversations of a file or folder, in its order: each row a list of messages, or an object with ``messages``.

    A message is ``{"role": ..., "content": ...}``; an assistant's content may be a list of parts.
    """

    def __init__(self, path: str, shuffle_seed: int | None = None, **options: Any) -> None:
        """Name the file.

        Args:
            path: a .jsonl, .jsonl.gz or .parquet file, or a folder of them.
            shuffle_seed: order of the conversations; null keeps the file's.
            options: see `RowTask`.
        """
        super().__init__(hub=None, path=path, shuffle_seed=shuffle_seed, **options)
        self.file = path

    @property
    def name(self) -> str:
        return f"{super().name}/{Path(self.file).name.split('.')[0]}"

    def conversation(self, row: Any) -> Conversation:
        return parse_messages(row if isinstance(row, list) else field(row, "messages", list))
