"""Conversion of records in common conversation formats, and its notes and errors."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lmchat.tasks.conversation_formats import convert
from lmchat.tasks.row_files import MalformedRow

USER, ANSWER = {"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}
SYSTEM = {"role": "system", "content": "be brief"}
CALL = {"id": "1", "type": "function", "function": {"name": "calculator", "arguments": '{"expression": "6*7"}'}}


RESULT = {"role": "tool", "content": "42"}
OUTPUT = {"type": "python_output", "text": "42"}


def text(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": each} for each in texts]


@pytest.mark.parametrize(
    ("row", "form", "messages"),
    [
        ([USER, ANSWER], "messages", [USER, ANSWER]),
        ({"messages": [SYSTEM, USER, ANSWER]}, "messages", [SYSTEM, USER, ANSWER]),
        ({"messages": [USER, ANSWER], "prompt": None, "completion": None}, "messages", [USER, ANSWER]),
        ({"conversation": [USER, ANSWER]}, "messages", [USER, ANSWER]),
        ({"conversations": [USER, ANSWER], "system": "be brief"}, "messages", [SYSTEM, USER, ANSWER]),
        (
            {"conversations": [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "hi"}]},
            "sharegpt",
            [USER, ANSWER],
        ),
        ({"instruction": "hello", "output": "hi"}, "alpaca", [USER, ANSWER]),
        ({"instruction": "hello", "input": "", "output": "hi", "system": "be brief"}, "alpaca", [SYSTEM, USER, ANSWER]),
        (
            {"instruction": "hello", "input": "you", "response": "hi", "history": [["hello", "hi"]]},
            "alpaca",
            [USER, ANSWER, {"role": "user", "content": "hello\n\nyou"}, ANSWER],
        ),
        (
            {"instruction": "hello", "context": "you", "response": "hi"},
            "alpaca",
            [{"role": "user", "content": "hello\n\nyou"}, ANSWER],
        ),
        ({"instruction": "", "input": "hello", "output": "hi"}, "alpaca", [USER, ANSWER]),
        ({"messages": json.dumps([USER, ANSWER])}, "messages", [USER, ANSWER]),
        ({"prompt": "hello", "completion": "hi"}, "prompt_completion", [USER, ANSWER]),
        ({"input": "hello", "output": "hi"}, "prompt_completion", [USER, ANSWER]),
        ({"query": "hello", "response": "hi"}, "prompt_completion", [USER, ANSWER]),
        ({"question": "hello", "answer": "hi"}, "prompt_completion", [USER, ANSWER]),
        ({"prompt": [SYSTEM, USER], "completion": [ANSWER]}, "prompt_completion", [SYSTEM, USER, ANSWER]),
        (
            {"messages": [{"role": "user", "content": [*text("a", "b")]}, {"role": "assistant", "content": text("c")}]},
            "messages",
            [{"role": "user", "content": "a\nb"}, {"role": "assistant", "content": "c"}],
        ),
    ],
)
def test_formats_are_recognized_by_their_fields(row: Any, form: str, messages: list[Any]) -> None:
    converted = convert(row)
    assert converted.format == form
    assert converted.conversation == {"messages": messages}
    assert convert(row, form).conversation == converted.conversation  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("messages", "expected", "note"),
    [
        ([{**SYSTEM, "role": "developer"}, USER, ANSWER], [SYSTEM, USER, ANSWER], "role developer read as system"),
        (
            [USER, USER, ANSWER],
            [{"role": "user", "content": "hello\n\nhello"}, ANSWER],
            "user messages in a row joined",
        ),
        (
            [USER, ANSWER, ANSWER],
            [USER, {"role": "assistant", "content": "hi\n\nhi"}],
            "assistant messages in a row joined",
        ),
        (
            [USER, ANSWER, SYSTEM, USER, ANSWER],
            [USER, ANSWER, {"role": "user", "content": "be brief\n\nhello"}, ANSWER],
            "a system message in the middle joined to the next user message",
        ),
        ([SYSTEM, SYSTEM, USER, ANSWER], [{**SYSTEM, "content": "be brief\n\nbe brief"}, USER, ANSWER], None),
        ([USER, ANSWER, SYSTEM], [USER, ANSWER], "a system message at the end left out"),
        ([{**SYSTEM, "content": ""}, USER, ANSWER], [USER, ANSWER], "an empty system message left out"),
        ([{**USER, "role": "User "}, ANSWER], [USER, ANSWER], "role User read as user"),
        ([USER, ANSWER, USER], [USER, ANSWER, USER], "a last user message without an answer receives no loss"),
        ([USER, {**ANSWER, "name": "Bo"}], [USER, ANSWER], "field name of a message not used"),
        (
            [USER, {**ANSWER, "weight": 0}, USER, {**ANSWER, "weight": 1.0}],
            [USER, {**ANSWER, "weight": 0}, USER, ANSWER],
            "an assistant message of weight 0 read without loss",
        ),
        ([USER, {**ANSWER, "train": False}], [USER, {**ANSWER, "weight": 0}], None),
        (
            [USER, ANSWER, {"role": "tool", "tool_call_id": "1", "content": "42"}, ANSWER],
            [
                USER,
                {"role": "assistant", "content": [*text("hi"), {"type": "python_output", "text": "42"}, *text("hi")]},
            ],
            "a tool's result read as the calculator's output",
        ),
        (
            [
                USER,
                {"role": "assistant", "content": None, "tool_calls": [CALL]},
                {"role": "tool", "content": "42"},
                ANSWER,
            ],
            [
                USER,
                {
                    "role": "assistant",
                    "content": [
                        {"type": "python", "text": "6*7"},
                        {"type": "python_output", "text": "42"},
                        *text("hi"),
                    ],
                },
            ],
            "a tool call read as a call of the calculator",
        ),
        (
            [
                USER,
                {"from": "function_call", "value": 'weather({"in": "Ulm"})'},
                {"from": "observation", "value": "rain"},
                {"from": "gpt", "value": "hi"},
            ],
            [
                USER,
                {
                    "role": "assistant",
                    "content": [
                        {"type": "python", "text": 'weather({"in": "Ulm"})'},
                        {"type": "python_output", "text": "rain"},
                        *text("hi"),
                    ],
                },
            ],
            "role observation read as a tool's result",
        ),
    ],
)
def test_unsupported_fields_are_mapped_and_reported(messages: list[Any], expected: list[Any], note: str | None) -> None:
    converted = convert({"messages": messages})
    assert converted.conversation == {"messages": expected}
    assert note is None or note in converted.notes


def test_an_exact_record_is_not_reported() -> None:
    parts = [*text("a", "b"), {"type": "python", "text": "1+1"}, {"type": "python_output", "text": "2"}]
    messages = [SYSTEM, USER, {"role": "assistant", "content": parts}, USER, ANSWER]
    converted = convert({"messages": messages})
    assert converted.conversation == {"messages": messages} and not converted.notes
    assert convert({"messages": [USER, ANSWER], "id": 3}).notes == {"field id of the record not used"}


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ("hello", "the row is str"),
        ({}, "no known format has the fields .none."),
        ({"text": "a"}, "no known format has the fields text; use messages"),
        ({"messages": "a"}, "field 'messages' is str, not a list of messages"),
        ({"messages": "{}"}, "field 'messages' is dict, not a list of messages"),
        ({"conversations": "[" * 100_000}, "field 'conversations' is str"),
        ({"prompt": "a", "chosen": "b"}, "no known format has the fields prompt, chosen"),
        ({"messages": []}, "at least one user message"),
        ({"messages": [USER]}, "no assistant message"),
        ({"messages": [SYSTEM]}, "at least one user message"),
        ({"messages": [ANSWER, USER, ANSWER]}, "message 0 has role 'assistant' where 'user' is expected"),
        ({"messages": [USER, SYSTEM, ANSWER]}, "message 2 follows a system message in the middle"),
        ({"messages": ["a", ANSWER]}, "message 0 must be an object"),
        ({"messages": [USER, {"role": "critic", "content": "x"}]}, "message 1 has unknown role 'critic'"),
        ({"messages": [USER, {"content": "x"}]}, "message 1 has unknown role None"),
        ({"messages": [USER, {"role": "assistant", "content": ""}]}, "message 1 .assistant. is empty"),
        ({"messages": [USER, {"role": "assistant"}]}, "message 1 has content of type NoneType"),
        ({"messages": [USER, {"role": "assistant", "content": 3}]}, "message 1 has content of type int"),
        ({"messages": [USER, {"role": "assistant", "content": [3]}]}, "message 1 has a part of type int"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, ANSWER]}, "part of type image_url"),
        ({"messages": [{"role": "user", "content": [{"type": "python", "text": "1"}]}, ANSWER]}, "has tool parts"),
        ({"messages": [USER, {"role": "tool", "content": "x"}, ANSWER]}, "message 1 is a tool's, without"),
        ({"messages": [USER, {**ANSWER, "weight": 0.5}]}, "message 1 has weight 0.5"),
        ({"messages": [USER, {**ANSWER, "weight": 0}, ANSWER]}, "continues an assistant message of another weight"),
        ({"messages": [USER, {"role": "assistant", "content": "\ud83d"}]}, "half a surrogate pair"),
        ({"messages": [USER, {"role": "assistant", "tool_calls": [{"id": 1}]}]}, "a tool call without a name"),
        ({"instruction": "a", "output": 3}, "message 1 has content of type int"),
        ({"instruction": ["a"], "output": "b"}, "field 'instruction' is list"),
        ({"instruction": "a", "output": "b", "history": ["c"]}, "field 'history' is not a list of pairs"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "this is preference pairs; save each prompt and chosen"),
        ({"custom_id": "1", "body": {"messages": [USER, ANSWER]}}, "a request of OpenAI's batch interface"),
        ({"custom_id": "1", "response": {}}, "a response of OpenAI's batch interface"),
        ({"contents": [{"role": "user", "parts": []}]}, "this is Gemini's format"),
        ({"title": "a", "mapping": {}}, "an export of ChatGPT's conversations"),
        ({"data": [{"messages": [USER, ANSWER]}]}, "records inside a field; save what is in data"),
        ({"instruction": "a", "output": "b", "history": 5}, "field 'history' is not a list of pairs"),
        ({"messages": [{"role": "assistant", "tool_calls": 5}]}, "tool_calls of type int: it must be a list"),
        ({"messages": [{"role": "assistant", "tool_calls": {"name": "f"}}]}, "tool_calls of type dict"),
    ],
)
def test_unmappable_records_are_refused(row: Any, complaint: str) -> None:
    with pytest.raises(MalformedRow, match=complaint):
        convert(row)


@pytest.mark.parametrize("completion", ["hi", [ANSWER]])
def test_a_completion_labelled_as_bad_receives_no_loss(completion: Any) -> None:
    bad = convert({"prompt": "hello", "completion": completion, "label": False})
    assert bad.conversation["messages"] == [USER, {**ANSWER, "weight": 0}]
    assert bad.notes == {"an assistant message of weight 0 read without loss"}
    good = convert({"prompt": "hello", "completion": completion, "label": True})
    assert (good.conversation["messages"], good.notes) == ([USER, ANSWER], set())


def test_a_given_format_refuses_the_others() -> None:
    with pytest.raises(MalformedRow, match="has the format messages, not alpaca"):
        convert([USER, ANSWER], "alpaca")
