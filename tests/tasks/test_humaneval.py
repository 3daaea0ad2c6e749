from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lmchat.tasks.humaneval import HumanEval, extract_code

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


def passes(program: str) -> bool:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=30).returncode == 0


def test_the_program_passes_with_the_solution_and_fails_without(task: HumanEval) -> None:
    conversation = task[0]
    reference = str(conversation["messages"][1]["content"])
    assert passes(task.program(conversation, reference))
    assert passes(task.program(conversation, f"Sure:\n\n```python\n{reference}```\nThat is it."))
    assert passes(task.program(conversation, "def area(r):\n    return pi * r**2\n"))  # the imports are the prompt's
    assert not passes(task.program(conversation, reference.replace("pi * r", "r")))
    assert not passes(task.program(conversation, "I do not know"))


def test_real_solutions_pass_their_own_tests(shared_data: Path) -> None:
    task = HumanEval(path=str(shared_data / "humaneval" / "HumanEval.jsonl.gz"), stop=4)
    for conversation in task:
        assert passes(task.program(conversation, str(conversation["messages"][1]["content"])))


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
