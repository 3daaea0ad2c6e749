from __future__ import annotations

import json
from pathlib import Path

import pytest

from lmchat.evaluation.sandbox import Sandbox
from lmchat.tasks.humaneval import HumanEval, extract_code
from lmchat.types import Conversation

ROW = {
    "task_id": "x/0",
    "prompt": 'from math import pi\n\n\ndef area(r):\n    """Area of a circle."""\n',
    "canonical_solution": "    return pi * r * r\n",
    "entry_point": "area",
    "test": "def check(candidate):\n    assert abs(candidate(1) - 3.14159) < 1e-3\n",
}


@pytest.fixture
def task(tmp_path: Path) -> HumanEval:
    path = tmp_path / "test.jsonl"
    path.write_text(json.dumps(ROW) + "\n")
    return HumanEval(path=str(path))


def passes(task: HumanEval, *answers: tuple[Conversation, str]) -> list[bool]:
    sandbox = Sandbox(allow_weak=True)
    return [verdict.passed for verdict in sandbox.run([task.code_check(*answer) for answer in answers])]


def test_programs_pass_with_the_solution_and_fail_without(task: HumanEval) -> None:
    conversation = task[0]
    reference = str(conversation["messages"][1]["content"])
    right = [
        reference,
        f"Sure:\n\n```python\n{reference}```\nThat is it.",
        "def area(r):\n    return pi * r**2\n",  # the imports are the prompt's
    ]
    wrong = [reference.replace("pi * r", "r"), "I do not know", ""]
    assert passes(task, *((conversation, answer) for answer in right)) == [True] * 3
    assert passes(task, *((conversation, answer) for answer in wrong)) == [False] * 3


def test_real_solutions_pass_their_own_tests(shared_data: Path) -> None:
    task = HumanEval(path=str(shared_data / "humaneval" / "HumanEval.jsonl.gz"))
    some = [task[index] for index in (0, 1, 32, 38, 50)]  # the tests of some use other functions of the prompt
    assert all(passes(task, *((each, str(each["messages"][1]["content"])) for each in some)))


@pytest.mark.parametrize(
    ("completion", "code"),
    [
        ("x = 1\n", "x = 1"),
        ("```python\nx = 1\n```", "x = 1"),
        ("First\n```py\nx = 1\n```\nthen\n```\ny = 2\n```", "x = 1"),
        ("```\n    return 1", "    return 1"),
    ],
)
def test_extracts_the_first_block(completion: str, code: str) -> None:
    assert extract_code(completion) == code
