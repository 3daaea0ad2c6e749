from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from lmchat.tasks.conversation_formats import convert
from lmchat.tasks.jsonl import JSONLConversations, SmolTalk
from lmchat.types import UserError

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
    assert convert(messages).conversation == {"messages": messages}


def test_rows_are_lists_or_objects_in_the_order_of_the_file(tmp_path: Path) -> None:
    rows = [[USER, ASSISTANT], {"messages": [SYSTEM, USER, TOOL], "source": "somewhere"}]
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert list(JSONLConversations(str(path))) == [{"messages": [USER, ASSISTANT]}, {"messages": [SYSTEM, USER, TOOL]}]
    assert JSONLConversations(str(path)).name == "JSONLConversations/chat"


def test_parquet_files_may_contain_conversations(tmp_path: Path) -> None:
    rows = [{"messages": [SYSTEM, USER, ASSISTANT], "source": "x"}]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    assert list(SmolTalk(path=str(tmp_path))) == [{"messages": [SYSTEM, USER, ASSISTANT]}]


def test_real_conversations_load(shared_data: Path) -> None:
    task = JSONLConversations(str(shared_data / "chat" / "val.jsonl"))
    assert len(task) == 767
    assert len(JSONLConversations(str(shared_data / "chat" / "identity_conversations.jsonl"))) == 945


def asked(task: JSONLConversations) -> list[Any]:
    return [conversation["messages"][0]["content"] for conversation in task]


def write_lines(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_split_holds_out_by_content_alone(tmp_path: Path) -> None:
    rows = [[{"role": "user", "content": f"question {number % 60}"}, ASSISTANT] for number in range(90)]
    forward = write_lines(tmp_path / "forward.jsonl", rows)
    backward = write_lines(tmp_path / "backward.jsonl", rows[::-1])
    splits = {}
    for path in (forward, backward):
        train, val = (JSONLConversations(path, split=split, val_fraction=0.1) for split in ("train", "val"))
        assert sorted([*asked(train), *asked(val)]) == sorted(row[0]["content"] for row in rows)
        assert not set(asked(train)) & set(asked(val)), "equal conversations are in one split"
        assert 7 <= len(val) <= 9
        splits[path] = set(asked(val))
        shared = JSONLConversations(path, split="val", val_fraction=0.1)
        shared.share_rows(train)
        assert asked(shared) == asked(val) and shared.rows is train.rows
    assert splits[forward] == splits[backward]
    held_out = asked(JSONLConversations(forward, split="val"))
    rest = [content for content in asked(JSONLConversations(forward)) if content not in held_out]
    assert asked(JSONLConversations(forward, split="train")) == rest


@pytest.mark.parametrize("distinct", [1, 2])
def test_a_split_of_few_conversations_leaves_none_empty(distinct: int, tmp_path: Path) -> None:
    rows = [[{"role": "user", "content": str(number % distinct)}, ASSISTANT] for number in range(6)]
    path = write_lines(tmp_path / "few.jsonl", rows)
    train, val = (JSONLConversations(path, split=split) for split in ("train", "val"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert len(train) == len(val) == 6 // distinct
    assert any("all conversations are equal" in str(warning.message) for warning in caught) is (distinct == 1)


def test_notes_count_records_read_mapped_and_left_out(tmp_path: Path) -> None:
    rows = [
        [USER, ASSISTANT],
        {"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]},
        {"a": 1},
    ]
    task = JSONLConversations(write_lines(tmp_path / "mixed.jsonl", rows))
    with pytest.warns(UserWarning, match=r"1 of 3 rows are malformed:\n.*mixed.jsonl, line 3: no known form"):
        assert len(task) == 2
    notes = "\n".join(task.notes())
    for expected in ("2 of 3 records read", "1 × records of the format sharegpt", "1 × role human read as user"):
        assert expected in notes
    with pytest.raises(UserError, match="1 of 3 rows are malformed"):
        len(JSONLConversations(str(task.path), skip_malformed=False))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "xml"}, "format is xml; use messages"),
        ({"val_fraction": 1}, "val_fraction is 1; use a number between"),
    ],
)
def test_options_out_of_range_are_reported(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        JSONLConversations("x.jsonl", **options)
