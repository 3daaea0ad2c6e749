"""Conversations as rows of token ids with a loss mask.

    <|bos|> (<|user_start|> user <|user_end|> <|assistant_start|> assistant <|assistant_end|>)*

Inside an assistant turn: prose, ``<|python_start|> expression <|python_end|>`` for a calculator call and
``<|output_start|> result <|output_end|>`` for its answer. The mask is 1 where the assistant speaks: prose, calls with
both their markers, and the end of its turn. Calculator answers are forced, not spoken, so they have mask 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lmchat.tokenizer.bpe import Tokenizer
from lmchat.types import Conversation, UserError

_MARKED_PARTS = {"python": ("python_start", "python_end", 1), "python_output": ("output_start", "output_end", 0)}
_TURNS = ("user", "assistant")


def render_conversation(
    tokenizer: Tokenizer, conversation: Conversation, max_tokens: int = 2048
) -> tuple[list[int], list[int]]:
    """Ids of a conversation and its loss mask (0 or 1 per id), both cut to ``max_tokens``.

    Raises:
        UserError: roles out of order, an empty message or an unknown part; it names the message's index.
    """
    ids, mask = _render(tokenizer, _turns(conversation))
    return ids[:max_tokens], mask[:max_tokens]


def render_for_completion(tokenizer: Tokenizer, conversation: Conversation) -> list[int]:
    """Ids of a prompt that the assistant is to answer: the conversation without a final assistant message, then
    ``<|assistant_start|>``. Never cut, for a cut prompt would lose the question.

    Raises:
        UserError: as `render_conversation`.
    """
    turns = _turns(conversation)
    if turns[-1]["role"] == "assistant":
        turns.pop()
    ids, _ = _render(tokenizer, turns)
    return [*ids, tokenizer.special("assistant_start")]


def _render(tokenizer: Tokenizer, turns: list[dict[str, Any]]) -> tuple[list[int], list[int]]:
    ids, mask = [tokenizer.bos_id], [0]
    for turn in turns:
        for span, spoken in _turn_spans(tokenizer, turn["role"], turn["content"]):
            ids += span
            mask += [spoken] * len(span)
    return ids, mask


def _turn_spans(tokenizer: Tokenizer, role: str, content: Any) -> Iterator[tuple[list[int], int]]:
    """The runs of ids of one turn, each with its mask."""
    if role == "user":
        yield [tokenizer.special("user_start"), *tokenizer.encode(content), tokenizer.special("user_end")], 0
        return
    yield [tokenizer.special("assistant_start")], 0
    for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
        ids = tokenizer.encode(part["text"])
        if part["type"] == "text":
            yield ids, 1
        else:
            start, end, spoken = _MARKED_PARTS[part["type"]]
            yield [tokenizer.special(start), *ids, tokenizer.special(end)], spoken
    yield [tokenizer.special("assistant_end")], 1


def _turns(conversation: Conversation) -> list[dict[str, Any]]:
    """The checked messages, a leading system message merged into the first user message."""
    messages: list[Any] = list(conversation["messages"])
    for index, message in enumerate(messages):
        _check_message(index, message)
    has_system = bool(messages) and messages[0]["role"] == "system"
    for index, message in enumerate(messages[has_system:], start=has_system):
        expected = _TURNS[(index - has_system) % 2]
        if message["role"] != expected:
            raise UserError(
                f"message {index} has role {message['role']!r} where {expected!r} is due: after an optional system "
                "message, user and assistant take turns"
            )
    if len(messages) == has_system:
        raise UserError("a conversation needs at least one user message")
    if has_system:
        merged = f"{messages[0]['content']}\n\n{messages[1]['content']}"
        messages[:2] = [{"role": "user", "content": merged}]
    return messages


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
    if not content:
        raise UserError(f"message {index} ({role}) is empty: give it content or leave the conversation out")


def _check_part(index: int, part: Any) -> None:
    if not isinstance(part, dict) or not isinstance(part.get("text"), str):
        raise UserError(f"message {index} has a part that is not an object with type and text: {part!r:.200}")
    if part.get("type") not in ("text", *_MARKED_PARTS):
        raise UserError(
            f"message {index} has a part of unknown type {part.get('type')!r}: use text, python or python_output"
        )
