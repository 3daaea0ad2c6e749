from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmchat.tokenizer.bpe import SPECIAL_TOKENS, Tokenizer
from lmchat.tokenizer.render import render_conversation, render_for_completion
from lmchat.types import UserError


def conversation(*turns: tuple[str, Any]) -> Any:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def part(kind: str, text: str) -> dict[str, str]:
    return {"type": kind, "text": text}


def spelled(text: str) -> list[int]:
    """Ids without merges: bytes are their own ids, special tokens follow from 256 in order."""
    pieces = re.split("(" + "|".join(map(re.escape, SPECIAL_TOKENS)) + ")", text)
    special = {name: [256 + i] for i, name in enumerate(SPECIAL_TOKENS)}
    return [token for piece in pieces for token in special.get(piece, list(piece.encode()))]


@pytest.fixture(scope="module")
def byte_tokenizer() -> Tokenizer:
    return Tokenizer({bytes([byte]): byte for byte in range(256)})


def test_layout_and_mask(byte_tokenizer: Tokenizer) -> None:
    tool_use = [part("text", "It is "), part("python", "2+2"), part("python_output", "4"), part("text", "4.")]
    case = conversation(("user", "2+2?"), ("assistant", tool_use), ("user", "ok"), ("assistant", "bye"))
    spans = [
        ("<|bos|><|user_start|>2+2?<|user_end|><|assistant_start|>", 0),
        ("It is <|python_start|>2+2<|python_end|>", 1),
        ("<|output_start|>4<|output_end|>", 0),
        ("4.<|assistant_end|>", 1),
        ("<|user_start|>ok<|user_end|><|assistant_start|>", 0),
        ("bye<|assistant_end|>", 1),
    ]
    ids, mask = render_conversation(byte_tokenizer, case)
    assert ids == [token for text, _ in spans for token in spelled(text)]
    assert mask == [spoken for text, spoken in spans for _ in spelled(text)]


def test_system_message_is_merged_into_the_first_user_message(byte_tokenizer: Tokenizer) -> None:
    turns = [("assistant", "Aye"), ("user", "Bye"), ("assistant", "So long")]
    with_system = conversation(("system", "Be a pirate."), ("user", "Hi"), *turns)
    merged = conversation(("user", "Be a pirate.\n\nHi"), *turns)
    assert render_conversation(byte_tokenizer, with_system) == render_conversation(byte_tokenizer, merged)
    assert with_system["messages"][0] == {"role": "system", "content": "Be a pirate."}, "the input was changed"
    assert with_system["messages"][1]["content"] == "Hi", "the input was changed"


@pytest.mark.parametrize("max_tokens", [0, 1, 7, 20, 10_000])
def test_truncation_is_a_prefix(byte_tokenizer: Tokenizer, max_tokens: int) -> None:
    case = conversation(("user", "question"), ("assistant", "answer"))
    ids, mask = render_conversation(byte_tokenizer, case)
    expected = ids[:max_tokens], mask[:max_tokens]
    assert render_conversation(byte_tokenizer, case, max_tokens) == expected


def test_truncates_to_2048_by_default(byte_tokenizer: Tokenizer) -> None:
    case = conversation(("user", "x" * 5000), ("assistant", "answer"))
    ids, mask = render_conversation(byte_tokenizer, case)
    assert (len(ids), len(mask), sum(mask)) == (2048, 2048, 0)


def test_completion_prompt(byte_tokenizer: Tokenizer) -> None:
    turns = [("user", "one"), ("assistant", "1"), ("user", "two")]
    prompt = spelled(
        "<|bos|><|user_start|>one<|user_end|><|assistant_start|>1<|assistant_end|>"
        "<|user_start|>two<|user_end|><|assistant_start|>"
    )
    assert render_for_completion(byte_tokenizer, conversation(*turns, ("assistant", "2"))) == prompt
    assert render_for_completion(byte_tokenizer, conversation(*turns)) == prompt
    long = render_for_completion(byte_tokenizer, conversation(("user", "x" * 5000)))
    assert len(long) == 5004, "a prompt is never cut"


@given(text=st.sampled_from(SPECIAL_TOKENS), before=st.text(max_size=5), after=st.text(max_size=5))
@settings(max_examples=50, deadline=None)
def test_content_never_contains_special_tokens(tokenizer: Tokenizer, text: str, before: str, after: str) -> None:
    content = before + text + after
    parts = [part("text", content), part("python", content), part("python_output", content)]
    ids, _ = render_conversation(tokenizer, conversation(("user", content), ("assistant", parts)))
    marks = [token - tokenizer.bos_id for token in ids if token >= tokenizer.bos_id]
    assert marks == [0, 1, 2, 3, 5, 6, 7, 8, 4]


def test_matches_the_oracle(tokenizer: Tokenizer, c07: dict[str, Any]) -> None:
    for case in c07["conversations"]:
        assert render_conversation(tokenizer, case, case["max_tokens"]) == (case["ids"], case["mask"])
        assert render_for_completion(tokenizer, case) == case["render_for_completion"]
    truncated = c07["truncated_to_20_conversation_3"]
    expected = truncated["ids"], truncated["mask"]
    assert render_conversation(tokenizer, c07["conversations"][3], 20) == expected
    for case in c07["invalid"]:
        with pytest.raises(UserError):
            render_conversation(tokenizer, case)


def test_malformed_conversations_are_refused(byte_tokenizer: Tokenizer) -> None:
    case = conversation(("user", "a"), ("user", "b"))
    for render in (render_conversation, render_for_completion):
        with pytest.raises(UserError, match="message 1 has role 'user' where 'assistant' is expected"):
            render(byte_tokenizer, case)
        with pytest.raises(UserError, match="a conversation is"):
            render(byte_tokenizer, {})  # type: ignore[typeddict-item]
