"""Renders conversations to token ids with a loss mask.

    <|bos|> (<|user_start|> user <|user_end|> <|assistant_start|> assistant <|assistant_end|>)*

An assistant turn consists of text, calculator calls (``<|python_start|> expression <|python_end|>``) and their results
(``<|output_start|> result <|output_end|>``). The mask is 1 for what the model has to generate: text, calls with both
markers, and ``<|assistant_end|>``. It is 0 for results, which are forced, and for messages of weight 0.
"""

from collections.abc import Iterator
from typing import Any

from lmchat.messages import check_messages
from lmchat.tokenizer.bpe import Tokenizer
from lmchat.types import Conversation, UserError

_MARKED_PARTS = {"python": ("python_start", "python_end", 1), "python_output": ("output_start", "output_end", 0)}


def render_conversation(
    tokenizer: Tokenizer, conversation: Conversation, max_tokens: int | None = 2048
) -> tuple[list[int], list[int]]:
    """Token ids of a conversation and its loss mask (0 or 1 per id), both cut to ``max_tokens``, if it is given.

    Raises:
        UserError: the conversation violates `lmchat.messages.check_messages`.
    """
    ids, mask = _render(tokenizer, _turns(conversation))
    return ids[:max_tokens], mask[:max_tokens]


def render_for_completion(tokenizer: Tokenizer, conversation: Conversation) -> list[int]:
    """Token ids of a prompt: the conversation without a final assistant message, then ``<|assistant_start|>``; not cut.

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
            mask += [spoken * int(turn.get("weight", 1))] * len(span)
    return ids, mask


def _turn_spans(tokenizer: Tokenizer, role: str, content: Any) -> Iterator[tuple[list[int], int]]:
    """Yields spans of ids of a turn, each with its mask."""
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
    """Checks the messages and merges a system message into the first user message."""
    if not isinstance(conversation.get("messages"), list):
        raise UserError(f"a conversation is {{'messages': [...]}}, not {str(conversation)[:80]}")
    messages: list[Any] = list(conversation["messages"])
    check_messages(messages)
    if messages[0]["role"] == "system":
        merged = f"{messages[0]['content']}\n\n{messages[1]['content']}"
        messages[:2] = [{"role": "user", "content": merged}]
    return messages
