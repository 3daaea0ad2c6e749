from __future__ import annotations

from collections import Counter

import pytest

from lmchat.demo.tasks.arithmetic import Arithmetic
from lmchat.demo.tasks.dialogue import Dialogue
from lmchat.tasks.base import Task, exchange
from lmchat.tasks.identity import Identity
from lmchat.types import Conversation, UserError


class WithSystem(Task):
    def num_examples(self) -> int:
        return 3

    def example(self, index: int) -> Conversation:
        return {"messages": [{"role": "system", "content": f"s{index}"}, *exchange(f"q{index}", "a")["messages"]]}


class Unanswered(Task):
    def num_examples(self) -> int:
        return 2

    def example(self, index: int) -> Conversation:
        return {"messages": [{"role": "user", "content": "Hello?"}]}


def test_conversations_without_an_answer_are_refused() -> None:
    with pytest.raises(UserError, match=r"conversation . of Unanswered ends with a message of the user"):
        list(Dialogue([Identity(size=2), Unanswered()]))


def test_only_questions_of_graded_tasks_are_graded() -> None:
    (conversation,) = Dialogue([WithSystem(stop=1)])
    with pytest.raises(UserError, match="WithSystem has no correct answers"):
        Dialogue([WithSystem(stop=1)]).reward(conversation, "a")


def test_every_example_is_used_once() -> None:
    tasks: list[Task] = [Arithmetic(size=40), Identity(size=30), Arithmetic(size=20, start=5, seed=1)]
    dialogue = Dialogue(tasks, max_examples=3)
    asked = Counter(str(message) for conversation in dialogue for message in conversation["messages"])
    assert asked == Counter(str(message) for task in tasks for example in task for message in example["messages"])
    assert len(dialogue) < 40 + 30 + 15


def test_the_number_of_examples_varies_up_to_the_limit() -> None:
    exchanges = Counter(len(example["messages"]) // 2 for example in Dialogue([Arithmetic(size=600)], max_examples=3))
    assert set(exchanges) == {1, 2, 3}
    assert min(exchanges.values()) > 70
    assert Counter(len(example["messages"]) for example in Dialogue([Arithmetic(size=9)], max_examples=1)) == {2: 9}


def test_a_conversation_has_at_most_one_system_message() -> None:
    (conversation,) = [c for c in Dialogue([WithSystem()], max_examples=9, seed=3) if len(c["messages"]) > 5]
    roles = [message["role"] for message in conversation["messages"]]
    assert roles == ["system", *["user", "assistant"] * (len(roles) // 2)]


def test_the_last_answer_is_graded_by_its_own_task() -> None:
    tasks: list[Task] = [Arithmetic("test", size=20), Identity("test", size=20)]
    dialogue = Dialogue(tasks, max_examples=3)
    names = set()
    for conversation in dialogue:
        answer = conversation["messages"][-1]["content"]
        text = answer if isinstance(answer, str) else "".join(part["text"] for part in answer)
        names.add(isinstance(answer, str))
        assert dialogue.evaluate(conversation, text)
        assert dialogue.reward(conversation, text) == 1
        assert not dialogue.evaluate(conversation, "#### -1")
    assert names == {True, False}


def test_another_seed_gives_another_order() -> None:
    first, again, other = (list(Dialogue([Arithmetic(size=20)], seed=seed)) for seed in (0, 0, 1))
    assert first == again != other


def test_an_empty_task_list_is_refused() -> None:
    with pytest.raises(UserError, match="number of tasks is 0"):
        Dialogue([])
    with pytest.raises(UserError, match="max_examples is 0; it must be at least 1"):
        Dialogue([Identity()], max_examples=0)
