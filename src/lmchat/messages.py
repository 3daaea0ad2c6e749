"""Validation of conversations, whether they come from a file, a task or a prompt."""

from typing import Any, get_args, get_type_hints

from lmchat.types import Part, UserError

PART_TYPES: tuple[str, ...] = get_args(get_type_hints(Part)["type"])
_TURNS = ("user", "assistant")


def check_messages(messages: list[Any]) -> None:
    """Checks for an optional system message, then user and assistant in turn, none of them empty.

    Raises:
        UserError: roles out of order, an empty message, an unknown part, or no message of the user; it names the
            message by its index, from 0.
    """
    for index, message in enumerate(messages):
        _check_message(index, message)
    has_system = bool(messages) and messages[0]["role"] == "system"
    for index, message in enumerate(messages[has_system:], start=has_system):
        expected = _TURNS[(index - has_system) % 2]
        if message["role"] != expected:
            raise UserError(
                f"message {index} has role {message['role']!r} where {expected!r} is expected: after an optional "
                "system message, user and assistant take turns"
            )
    if len(messages) == has_system:
        raise UserError("a conversation needs at least one user message: add one, or leave the conversation out")


def _check_message(index: int, message: Any) -> None:
    if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
        raise UserError(f"message {index} must be an object with role and content, not {message!r:.200}")
    role, content = message["role"], message["content"]
    if role not in ("system", *_TURNS):
        raise UserError(f"message {index} has unknown role {role!r}: use system, user or assistant")
    if role == "assistant" and isinstance(content, list):
        for part in content:
            _check_part(index, part)
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        kinds = "a string or a list of parts" if role == "assistant" else "a string"
        raise UserError(f"message {index} ({role}) has content of type {type(content).__name__}: it must be {kinds}")
    if message.get("weight", 1) not in (0, 1):
        raise UserError(f"message {index} ({role}) has weight {message['weight']!r}: use 1, or 0 for no loss on it")
    if not content:
        raise UserError(f"message {index} ({role}) is empty: give it content or leave the conversation out")


def _check_part(index: int, part: Any) -> None:
    if not isinstance(part, dict) or not isinstance(part.get("text"), str):
        raise UserError(f"message {index} has a part that is not an object with type and text: {part!r:.200}")
    if part.get("type") not in PART_TYPES:
        *first, last = PART_TYPES
        raise UserError(
            f"message {index} has a part of unknown type {part.get('type')!r}: use {', '.join(first)} or {last}"
        )
