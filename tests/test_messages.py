from __future__ import annotations

from typing import Any

import pytest

from lmchat.messages import check_messages
from lmchat.types import UserError


def turns(*pairs: tuple[str, Any]) -> list[Any]:
    return [{"role": role, "content": content} for role, content in pairs]


def part(kind: str, text: str) -> dict[str, str]:
    return {"type": kind, "text": text}


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        (turns(), "at least one user message"),
        (turns(("system", "alone")), "at least one user message"),
        (turns(("assistant", "hi")), "message 0 has role 'assistant' where 'user' is expected"),
        (turns(("user", "a"), ("user", "b")), "message 1 has role 'user' where 'assistant' is expected"),
        (turns(("system", "x"), ("assistant", "y")), "message 1 has role 'assistant' where 'user' is expected"),
        (turns(("user", "a"), ("system", "y")), "message 1 has role 'system' where 'assistant' is expected"),
        (turns(("system", "x"), ("system", "y")), "message 1 has role 'system' where 'user' is expected"),
        (turns(("tool", "a")), "message 0 has unknown role 'tool'"),
        (turns(("user", "")), "message 0 .user. is empty"),
        (turns(("system", ""), ("user", "a")), "message 0 .system. is empty"),
        (turns(("user", "a"), ("assistant", [])), "message 1 .assistant. is empty"),
        (turns(("user", "a"), ("assistant", [part("text", "")])), "message 1 .assistant. is empty"),
        (turns(("user", [part("text", "a")])), "message 0 .user. has content of type list: .* a string"),
        (turns(("user", "a"), ("assistant", None)), "message 1 .assistant. has content of type NoneType"),
        (
            turns(("user", "a"), ("assistant", [part("image", "x")])),
            "message 1 has a part of unknown type",
        ),
        (turns(("user", "a"), ("assistant", ["x"])), "message 1 has a part that is not an object"),
        (turns(("user", "a"), ("assistant", [{"type": "text"}])), "message 1 has a part that is not an object"),
        ([{"role": "user"}], "message 0 must be an object with role and content"),
        (["hi"], "message 0 must be an object with role and content"),
    ],
)
def test_malformed_conversations_name_the_message(messages: list[Any], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        check_messages(messages)


def test_all_parts_and_system_messages_are_valid() -> None:
    tool_use = [part("text", ""), part("python", "1+1"), part("python_output", "2")]
    check_messages(turns(("system", "s"), ("user", "u"), ("assistant", tool_use), ("user", "u")))
