"""Conversations from files, and the rules every given conversation must keep."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args, get_type_hints

from lmchat.tasks.rows import MalformedRow, RowTask, checked_text, field
from lmchat.types import Conversation, Message, Part

PART_TYPES = get_args(get_type_hints(Part)["type"])


def parse_messages(messages: list[Any]) -> Conversation:
    """``messages`` as a conversation: an optional system message, then user and assistant in turn.

    Other fields of the messages and parts are left out.

    Raises:
        MalformedRow: roles out of order, an empty message, an unknown part, or no assistant message.
    """
    parsed = [_message(message, f"message {number}") for number, message in enumerate(messages, 1)]
    roles = [message["role"] for message in parsed]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    expected = ["user", "assistant"] * ((len(turns) + 1) // 2)
    if turns != expected[: len(turns)]:
        raise MalformedRow(f"roles are {', '.join(roles)}; expected: optional system, then user and assistant in turn")
    if len(turns) < 2:
        raise MalformedRow("there is no assistant message to learn from")
    return {"messages": parsed}


def _message(message: Any, what: str) -> Message:
    if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
        raise MalformedRow(f"{what} is no object with role and content")
    role, content = message["role"], message["content"]
    match role, content:
        case "system" | "user" | "assistant", str():
            return {"role": role, "content": checked_text(content, what)}
        case "assistant", list():
            return {"role": "assistant", "content": _parts(content, what)}
        case "system" | "user", _:
            raise MalformedRow(f"{what}: the content of a {role} message is {type(content).__name__}, not str")
        case "assistant", _:
            raise MalformedRow(f"{what}: the content is {type(content).__name__}, not str or a list of parts")
    raise MalformedRow(f"{what}: role '{role}' is none of system, user, assistant")


def _parts(parts: list[Any], what: str) -> list[Part]:
    parsed: list[Part] = []
    for number, part in enumerate(parts, 1):
        if not isinstance(part, dict) or not isinstance(part.get("text"), str) or part.get("type") not in PART_TYPES:
            raise MalformedRow(f"{what}, part {number}: needs a text and a type out of {', '.join(PART_TYPES)}")
        parsed.append({"type": part["type"], "text": part["text"]})
    checked_text("".join(part["text"] for part in parsed), what)
    return parsed


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
