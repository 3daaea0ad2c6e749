from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lmchat.tasks.base import MultipleChoice
from lmchat.tasks.multiple_choice import ARC, MMLU, render_multiple_choice
from lmchat.types import UserError


def write(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def mmlu_row(**changes: Any) -> dict[str, Any]:
    return {"question": "1+1?", "choices": ["1", "2", "3"], "answer": 1, "subject": "sums", **changes}


def arc_row(**changes: Any) -> dict[str, Any]:
    return {
        "question": "Which is hot?",
        "choices": {"text": ["ice", "fire"], "label": ["1", "2"]},
        "answerKey": "2",
        **changes,
    }


def test_the_prompt_matches_the_reference() -> None:
    assert render_multiple_choice("What is 2+2?", "ABCD", ["3", "4", "5", "22"]) == (
        "Multiple Choice question: What is 2+2?\n- 3=A\n- 4=B\n- 5=C\n- 22=D\n\n"
        "Respond only with the letter of the correct answer."
    )


def test_the_prompt_agrees_with_the_oracle(oracles: Path) -> None:
    case = json.loads((oracles / "c12_tasks.json").read_text())["render_mc"]
    assert render_multiple_choice(case["question"], case["letters"], case["choices"]) == case["text"]


def test_mmlu_answers_with_the_letter_at_the_index(tmp_path: Path) -> None:
    task = MMLU(path=write(tmp_path / "rows.jsonl", mmlu_row()))
    conversation = task[0]
    assert isinstance(task, MultipleChoice)
    assert conversation["messages"][1]["content"] == "B"
    assert task.letters(conversation) == ["A", "B", "C"]
    assert task.evaluate(conversation, "B")
    assert task.evaluate(conversation, " B\n")
    assert not task.evaluate(conversation, "A")
    assert not task.evaluate(conversation, "B or C")
    assert task.reward(conversation, "B") == 1.0


def test_mmlu_unwraps_the_rows_of_the_hubs_own_training_file(tmp_path: Path) -> None:
    plain, wrapped = (
        MMLU("auxiliary_train", path=write(tmp_path / name, row))
        for name, row in (("plain.jsonl", mmlu_row()), ("wrapped.jsonl", {"train": mmlu_row()}))
    )
    assert wrapped[0] == plain[0]


def test_arc_keeps_its_own_letters(tmp_path: Path) -> None:
    task = ARC(subset="ARC-Challenge", path=write(tmp_path / "rows.jsonl", arc_row()))
    assert task.letters(task[0]) == ["1", "2"]
    assert "- fire=2\n" in str(task[0]["messages"][0]["content"])
    assert task.evaluate(task[0], "2")
    assert task.name == "ARC-Challenge/test"


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"answer": 3}, "the answer 3 is not an index into 3 choices"),
        ({"answer": -1}, "the answer -1"),
        ({"answer": "B"}, "field 'answer' is str, not int"),
        ({"choices": ["only"], "answer": 0}, "1 choices"),
        ({"choices": ["a", ""]}, "choice B is empty"),
        ({"choices": ["a", 3]}, "choice B is int"),
    ],
)
def test_bad_mmlu_rows_are_refused(tmp_path: Path, changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        len(MMLU(path=write(tmp_path / "rows.jsonl", mmlu_row(**changes))))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"answerKey": "A"}, "the answer A is not one of the letters 1, 2"),
        ({"choices": {"text": ["a", "b"], "label": ["A", "A"]}, "answerKey": "A"}, "letters A, A"),
        ({"choices": {"text": ["a", "b", "c"], "label": ["1", "2"]}}, "3 choices"),
        ({"choices": ["a", "b"]}, "field 'choices' is list, not dict"),
        ({"choices": {"text": ["a", "b"], "label": [1, 2]}}, "a choice's letter is int, not str"),
        ({"choices": {"text": ["a", "b"], "label": ["2", None]}}, "a choice's letter is NoneType, not str"),
        ({"choices": {"text": ["a", "b"], "label": ["2", ""]}}, "a choice's letter is empty"),
    ],
)
def test_bad_arc_rows_are_refused(tmp_path: Path, changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        len(ARC(path=write(tmp_path / "rows.jsonl", arc_row(**changes))))


def test_real_questions_load(shared_data: Path) -> None:
    assert len(MMLU(split="validation", path=str(shared_data / "mmlu"))) == 1_531
    assert len(ARC(subset="ARC-Challenge", path=str(shared_data / "arc" / "ARC-Challenge"))) == 1_172
    with pytest.warns(UserWarning, match="62 of 8626 rows are malformed"):  # choices without text
        assert len(MMLU(path=str(shared_data / "mc" / "mc_train.jsonl.gz"), skip_malformed=True)) == 8_564
