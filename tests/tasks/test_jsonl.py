from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from lmchat.tasks.jsonl import JSONLConversations, parse_messages
from lmchat.tasks.rows import MalformedRow
from lmchat.tasks.smoltalk import SmolTalk

USER = {"role": "user", "content": "hello"}
ASSISTANT = {"role": "assistant", "content": "hi"}
SYSTEM = {"role": "system", "content": "be brief"}
TOOL = {
    "role": "assistant",
    "content": [
        {"type": "text", "text": ""},
        {"type": "python", "text": "1+1"},
        {"type": "python_output", "text": "2"},
        {"type": "text", "text": "2."},
    ],
}


@pytest.mark.parametrize("messages", [[USER, ASSISTANT], [SYSTEM, USER, TOOL], [USER, ASSISTANT, USER, TOOL, USER]])
def test_good_conversations_pass_unchanged(messages: list[Any]) -> None:
    assert parse_messages(messages) == {"messages": messages}


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ([], "at least one user message"),
        ([USER], "no assistant message"),
        ([SYSTEM, USER], "no assistant message"),
        ([ASSISTANT, USER], "message 0 has role 'assistant' where 'user' is due"),
        ([USER, SYSTEM, ASSISTANT], "message 1 has role 'system' where 'assistant' is due"),
        ([USER, {"role": "tool", "content": "x"}], "message 1 has unknown role 'tool'"),
        ([USER, {"role": "assistant", "content": []}], "message 1 .assistant. is empty"),
        ([USER, {"role": "assistant", "content": "\ud83d"}], "message 1 holds half a surrogate pair"),
        (["hello", ASSISTANT], "message 0 must be an object"),
    ],
)
def test_bad_conversations_are_malformed_rows(messages: list[Any], complaint: str) -> None:
    with pytest.raises(MalformedRow, match=complaint):
        parse_messages(messages)


def test_rows_are_lists_or_objects_in_the_order_of_the_file(tmp_path: Path) -> None:
    rows = [[USER, ASSISTANT], {"messages": [SYSTEM, USER, TOOL], "source": "somewhere"}]
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert list(JSONLConversations(str(path))) == [{"messages": [USER, ASSISTANT]}, {"messages": [SYSTEM, USER, TOOL]}]
    assert JSONLConversations(str(path)).name == "JSONLConversations/chat"
    with pytest.warns(UserWarning, match="1 of 2 rows"):
        assert len(SmolTalk(path=str(path), skip_malformed=True)) == 1  # which has objects only


def test_parquet_holds_conversations_too(tmp_path: Path) -> None:
    rows = [{"messages": [SYSTEM, USER, ASSISTANT], "source": "x"}]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    assert list(SmolTalk(path=str(tmp_path))) == [{"messages": [SYSTEM, USER, ASSISTANT]}]


def test_real_conversations_load(shared_data: Path) -> None:
    task = JSONLConversations(str(shared_data / "chat" / "val.jsonl"))
    assert len(task) == 767
    assert len(JSONLConversations(str(shared_data / "chat" / "identity_conversations.jsonl"))) == 945
