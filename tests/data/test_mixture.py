from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from lmchat.data.mixture import Mixture, MixturePart
from lmchat.tasks.base import Task, exchange, reference_answer
from lmchat.types import Conversation, UserError


class Labelled(Task):
    """Conversations that contain the names of their task and example."""

    def __init__(self, label: int, size: int, **slice: Any) -> None:
        super().__init__(**slice)
        self.label = label
        self.size = size

    @property
    def name(self) -> str:
        return f"task {self.label}"

    def num_examples(self) -> int:
        return self.size

    def example(self, index: int) -> Conversation:
        return exchange("which?", json.dumps([self.label, index]))


def order(mixture: Mixture) -> list[list[int]]:
    return [json.loads(reference_answer(conversation)) for conversation in mixture]


def oracle_parts() -> list[Task]:
    a, b, c = Labelled(0, 10), Labelled(1, 7), Labelled(2, 20, start=2, stop=12, step=3)
    return [a, b, a, c]


def test_order_matches_the_reference(fixtures: Path) -> None:
    oracle = json.loads((fixtures / "c12_tasks.json").read_text())["mixture_order"]
    mixture = Mixture([MixturePart(task) for task in oracle_parts()])
    assert len(mixture) == len(oracle)
    assert order(mixture) == oracle


def test_order_matches_all_oracle_cases(oracles: Path) -> None:
    oracle = json.loads((oracles / "c12_tasks.json").read_text())
    names = {"a": 0, "b": 1, "c": 2}
    assert order(Mixture([MixturePart(task) for task in oracle_parts()])) == [
        [names[name], index] for name, index in oracle["mixture"]["order"]
    ]


def test_without_shuffling_tasks_follow_each_other(fixtures: Path) -> None:
    oracle = json.loads((fixtures / "c12_tasks.json").read_text())["sequence"]
    sequence = Mixture([MixturePart(Labelled(0, 3)), MixturePart(Labelled(1, 2))], shuffle_seed=None)
    assert order(sequence) == oracle


def test_epochs_repeat_every_conversation() -> None:
    parts = [MixturePart(Labelled(0, 5), epochs=3), MixturePart(Labelled(1, 4)), MixturePart(Labelled(2, 6, stop=2), 2)]
    mixture = Mixture(parts)
    counts = Counter(map(tuple, order(mixture)))
    assert counts == {
        **{(0, i): 3 for i in range(5)},
        **{(1, i): 1 for i in range(4)},
        **{(2, i): 2 for i in range(2)},
    }
    assert mixture.counts() == {"task 0": 15, "task 1": 4, "task 2": 4}
    assert len(mixture) == 23


def test_epochs_equal_repeating_a_task() -> None:
    task, other = Labelled(0, 5), Labelled(1, 3)
    repeated = Mixture([MixturePart(task, epochs=2), MixturePart(other)])
    named_twice = Mixture([MixturePart(task), MixturePart(task), MixturePart(other)])
    assert order(repeated) == order(named_twice)
    assert repeated.counts() == named_twice.counts()


def test_locate_names_the_task_that_grades() -> None:
    mixture = Mixture([MixturePart(task) for task in oracle_parts()])
    for index in range(len(mixture)):
        part, local = mixture.locate(index)
        assert mixture.parts[part].task[local] == mixture[index]
    assert mixture[-1] == mixture[len(mixture) - 1]
    with pytest.raises(IndexError):
        mixture[len(mixture)]


def test_an_empty_part_is_skipped() -> None:
    mixture = Mixture([MixturePart(Labelled(0, 0)), MixturePart(Labelled(1, 3)), MixturePart(Labelled(2, 0))])
    assert sorted(order(mixture)) == [[1, 0], [1, 1], [1, 2]]


def test_seeds_change_only_the_order() -> None:
    parts = [MixturePart(Labelled(0, 50))]
    assert order(Mixture(parts, shuffle_seed=1)) != order(Mixture(parts))
    assert sorted(order(Mixture(parts, shuffle_seed=1))) == sorted(order(Mixture(parts)))


def test_mistakes_are_refused() -> None:
    with pytest.raises(UserError, match="epochs of task 0 is 0; it must be at least 1"):
        MixturePart(Labelled(0, 3), epochs=0)
    with pytest.raises(UserError, match="no parts"):
        Mixture([])
