from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmchat.tasks.base import exchange
from lmchat.tasks.gsm8k import GSM8K, answer_number, answers_match, extract_answer, parse_answer
from lmchat.types import UserError

# Recorded from the reference implementation.
EXTRACTED = {
    "#### 10": "10",
    "####10": None,
    "#### 10.0": "10.0",
    "#### - 5": None,
    "#### 1,234.50": "1234.50",
    "#### 10 apples": "10",
    "#### ": None,
    "#### 1.2.3": "1.2.3",
    "### 10": None,
    "#### 10<|assistant_end|>": "10",
    "#### -": None,
    "#### -5-3": "-5",
}


@pytest.mark.parametrize(("text", "answer"), EXTRACTED.items())
def test_extraction_matches_the_reference(text: str, answer: str | None) -> None:
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    ("reference", "completion", "by_number", "by_string"),
    [
        ("#### 10", "#### 10", True, True),
        ("#### 10", "so 5+5\n#### 10.", True, False),
        ("#### 10", "#### 10.00", True, False),
        ("#### 1,234", "#### 1234", True, True),
        ("#### -5", "#### -5.0", True, False),
        ("#### 0.5", "#### .5", True, False),
        ("#### 10", "#### 11", False, False),
        ("#### 10", "10", False, False),
        ("#### 10", "#### 1.0.", False, False),
        ("#### 10", "#### 9 #### 10", False, False),  # the first answer counts
        ("#### 3/4", "#### 3", False, True),
        ("none", "none", False, True),
        ("#### 1.2.3", "#### 1.2.3", False, True),
        ("#### 9007199254740993", "#### 9007199254740992", False, False),  # equal as floats
    ],
)
def test_numbers_are_compared_unless_the_string_rule_is_chosen(
    reference: str, completion: str, by_number: bool, by_string: bool
) -> None:
    assert answers_match(reference, completion) is by_number
    assert answers_match(reference, completion, rule="string") is by_string


@given(st.decimals(allow_nan=False, allow_infinity=False, places=4), st.integers(0, 4))
def test_trailing_zeros_are_ignored(value: object, zeros: int) -> None:
    assert answers_match(f"#### {value:f}", f"#### {value:f}" + "0" * zeros)


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("3/4", Fraction(3, 4)),
        ("2 1/2", Fraction(5, 2)),
        ("-2 1/2", Fraction(-5, 2)),
        ("1e3", Fraction(1000)),
        ("2.5E-1.", Fraction(1, 4)),
        ("1 000", Fraction(1000)),
        ("1\u202f234\u202f567", Fraction(1234567)),
        ("+7", Fraction(7)),
        ("−7", Fraction(-7)),
        ("3.125", Fraction(25, 8)),
        ("0.100", Fraction(1, 10)),
        *(
            (text, None)
            for text in ("10,5", "0,123", "1,23", "1.000", "12.340", "1.000,50", "1 234,567", "1'000", "1_000")
        ),
        *(
            (text, None)
            for text in ("3:30", "5-3", "50%", "$12", "42 apples", "5 million", "2 3/2", "3/0", "1/2/3", "2½")
        ),
        ("12 3/100", Fraction(1203, 100)),
        ("6<|assistant_end|><|user_start|>7", Fraction(6)),
        *(
            (text, None)
            for text in ("1 000/2", "-1 250/500", "6<|python_start|>6+1", "<|bos|>6", "6 <|output_start|>7")
        ),
        *((text, None) for text in ("1e9999", "4²", "0x10", "٣", "-", "e3", "inf", "nan")),
        ("9" * 5000, None),
    ],
)
def test_answers_are_read_correctly_or_rejected(written: str, value: Fraction | None) -> None:
    assert answer_number(f"So it is\n#### {written}\nGood.") == value
    assert answers_match(f"#### {written}", f"#### {written}") is (value is not None)


@pytest.mark.parametrize(
    ("reference", "wrong"),
    [("3/4", "3"), ("3/4", "3/8"), ("2 1/2", "2"), ("3:30", "3"), ("1e3", "1"), ("10,5", "105"), ("1 000", "1")],
)
def test_part_of_a_number_is_not_the_answer(reference: str, wrong: str) -> None:
    assert not answers_match(f"#### {reference}", f"#### {wrong}")
    assert not answers_match(f"#### {wrong}", f"#### {reference}")
    assert answers_match("#### 3/4", "#### 0.75")


@given(st.text(alphabet="#0123456789.,- x", max_size=40))
def test_any_text_can_be_graded(text: str) -> None:
    assert answers_match("#### 3", "#### " + text) in (True, False)
    assert answers_match("#### " + text, text, rule="string") in (True, False)


def test_calculator_calls_become_parts() -> None:
    assert parse_answer("6 a day, so 6*7 = $<<6*7=42>>42.\n#### 42") == [
        {"type": "text", "text": "6 a day, so 6*7 = $"},
        {"type": "python", "text": "6*7"},
        {"type": "python_output", "text": "42"},
        {"type": "text", "text": "42.\n#### 42"},
    ]
    assert parse_answer("a<<1=1=1>>b<<7>>")[1:6] == [
        {"type": "python", "text": "1=1"},  # split at the last equals sign
        {"type": "python_output", "text": "1"},
        {"type": "text", "text": "b"},
        {"type": "python", "text": "7"},
        {"type": "python_output", "text": ""},
    ]
    assert [part["type"] for part in parse_answer("<<>> x <<2=2>>")] == ["text", "python", "python_output", "text"]


def write(path: Path, rows: list[dict[str, str]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_grades_the_last_part_and_rewards_with_one(tmp_path: Path) -> None:
    rows = [{"question": "How much?", "answer": "That is <<2+2=4>>4.\n#### 4"}]
    task = GSM8K(path=write(tmp_path / "train.jsonl", rows))
    conversation = task[0]
    assert conversation == exchange(rows[0]["question"], parse_answer(rows[0]["answer"]))
    assert task.evaluate(conversation, "#### 4.0")
    assert task.reward(conversation, "#### 4.0") == 1.0
    assert task.reward(conversation, "4") == 0.0
    assert not GSM8K(path=str(tmp_path), answer_rule="string").evaluate(conversation, "#### 4.0")


def test_a_row_without_an_answer_is_malformed(tmp_path: Path) -> None:
    rows = [{"question": "How much?", "answer": "a lot"}, {"question": "How much?", "answer": "#### ."}]
    with pytest.raises(UserError, match=r"2 of 2 rows are malformed(.|\n)*line 1: field 'answer' has no number"):
        len(GSM8K(path=write(tmp_path / "train.jsonl", rows)))


def test_matches_all_oracle_cases(oracles: Path) -> None:
    oracle = json.loads((oracles / "c08_gsm8k_calculator.json").read_text())
    for case in oracle["extract"]:
        assert extract_answer(case["text"]) == case["answer"]
    task = GSM8K(answer_rule="string")
    for case in oracle["reward"]:
        reference = exchange("q", case["reference_last_text"])
        assert task.reward(reference, case["completion"]) == case["reward"]
        assert task.evaluate(reference, case["completion"]) == case["evaluate"]
    for case in oracle["row_to_conversation"]:
        expected = case["conversation"]
        question = expected["messages"][0]["content"]
        assert exchange(question, parse_answer(case["answer"])) == expected


@pytest.mark.parametrize(("split", "first"), [("train", "first3"), ("test", "first2")])
def test_real_rows_are_ordered_as_in_the_reference(oracles: Path, shared_data: Path, split: str, first: str) -> None:
    oracle = json.loads((oracles / "c12_tasks.json").read_text())[f"gsm8k_{split}"]
    task = GSM8K(split=split, path=str(shared_data / "gsm8k"))  # type: ignore[arg-type]
    assert len(task) == oracle["n"]
    assert [task[index] for index in range(len(oracle[first]))] == oracle[first]
