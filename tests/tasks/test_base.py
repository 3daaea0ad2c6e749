from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lmchat.tasks.base import Graded, Task, exchange, graded, message_text, reference_answer, reward_in_words_of
from lmchat.types import Conversation, UserError


class Numbers(Task):
    """The numbers below ``size`` as conversations."""

    def __init__(self, size: int = 20, **slice: Any) -> None:
        super().__init__(**slice)
        self.size = size

    def num_examples(self) -> int:
        return self.size

    def example(self, index: int) -> Conversation:
        return exchange("next?", str(index))


def values(task: Task) -> list[int]:
    return [int(reference_answer(task[index])) for index in range(len(task))]


def test_slices_match_the_reference(fixtures: Path) -> None:
    oracle = json.loads((fixtures / "c12_tasks.json").read_text())["slice"]
    task = Numbers(start=oracle["start"], stop=oracle["stop"], step=oracle["step"])
    assert len(task) == oracle["length"]
    assert values(task) == oracle["items"]


@pytest.mark.parametrize("start", [0, 3, 25])
@pytest.mark.parametrize("stop", [None, 25, 26, 400])
@pytest.mark.parametrize("step", [1, 4, 100])
def test_slices_equal_those_of_a_list(start: int, stop: int | None, step: int) -> None:
    task = Numbers(size=26, start=start, stop=stop, step=step)
    assert values(task) == list(range(26))[start:stop:step]
    assert [int(reference_answer(conversation)) for conversation in task] == values(task)


def test_negative_indices_and_iteration() -> None:
    task = Numbers(start=5, stop=8)
    assert reference_answer(task[-1]) == "7"
    with pytest.raises(IndexError):
        task[3]


@pytest.mark.parametrize("bad", [{"start": -1}, {"step": 0}, {"start": 3, "stop": 2}])
def test_refuses_impossible_slices(bad: dict[str, int]) -> None:
    with pytest.raises(UserError, match="slice"):
        Numbers(**bad)


class Guesses(Numbers, Graded):
    """Numbers that can be graded."""

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        return completion == reference_answer(conversation)


def test_only_tasks_that_grade_answers_are_evaluated() -> None:
    with pytest.raises(UserError, match="Numbers has no correct answers"):
        graded(Numbers())
    task = Guesses()
    assert graded(task) is task
    assert [task.reward(task[1], answer) for answer in ("1", "2")] == [1.0, 0.0]


def test_reference_answer_is_the_last_part() -> None:
    parts = [{"type": "text", "text": "first"}, {"type": "text", "text": "#### 3"}]
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": parts}]
    assert reference_answer({"messages": messages}) == "#### 3"  # type: ignore[typeddict-item]
    assert message_text(messages[-1]) == "first #### 3"  # type: ignore[typeddict-item]
    assert message_text(exchange("q", "a")["messages"][-1]) == "a"


@pytest.mark.parametrize(
    ("completion", "known"),
    [
        ("That makes 27 apples.", True),
        ("that MAKES <|python_start|>12+15<|python_end|>27", True),
        ("", True),
        ("That makes 27 app.", False),
        ("That makes 27applesthat.", False),
        ("27\n#### 27", False),
        ("That makes $27.", False),
        ("<|apples|> pears", False),
    ],
)
def test_full_reward_requires_words_of_the_texts(completion: str, known: bool) -> None:
    assert reward_in_words_of(True, completion, "That makes 5", "apples!") == (1.0 if known else 0.5)
    assert reward_in_words_of(False, completion, "That makes 5", "apples!") == 0.0
