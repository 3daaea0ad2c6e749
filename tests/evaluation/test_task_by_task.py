"""Evaluation by task name: intervals compared with their definition, saved results, and failures of single tasks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lmchat.evaluation import chat_core
from lmchat.evaluation.benchmark import evaluate_each, summary
from lmchat.evaluation.chat_core import ChatCoreEvaluator, make_task
from lmchat.evaluation.chat_tasks import grade
from lmchat.evaluation.intervals import Z_95, bootstrap_interval, wilson_interval
from lmchat.evaluation.sandbox import Sandbox
from lmchat.generation.sampling import SamplingParams
from lmchat.tasks.base import Graded, Task, exchange
from lmchat.tasks.base import graded as check_graded
from lmchat.tasks.humaneval import HumanEval
from lmchat.tokenizer.bpe import Tokenizer
from lmchat.types import Conversation, UserError


@pytest.mark.parametrize(("successes", "trials"), [(0, 10), (3, 10), (10, 10), (1, 1), (431, 1319), (7, 2000)])
def test_wilson_bounds_solve_their_equation(successes: int, trials: int) -> None:
    """A bound p satisfies (share − p)² = z² p (1 − p) / n."""
    for bound in wilson_interval(successes, trials):
        expected = Z_95**2 * bound * (1 - bound) / trials
        assert (successes / trials - bound) ** 2 == pytest.approx(expected, abs=1e-15)
    assert wilson_interval(0, 0) == (0, 1)


class Echo(Task, Graded):
    """Questions answered by their number; the answer of `answers` is correct."""

    def num_examples(self) -> int:
        return 5

    def example(self, index: int) -> Conversation:
        return exchange(str(index), str(index))

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        return completion == conversation["messages"][-1]["content"]


def policy(engine: str | None = None) -> Any:
    return SimpleNamespace(engine=engine, device="cpu")


def evaluate_tasks(policy: Any, tasks: dict[str, Task], path: Path) -> Iterator[tuple[str, Any]]:
    return evaluate_each((ChatCoreEvaluator({name: task}) for name, task in tasks.items()), policy, path, {})


@pytest.fixture
def graded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Mocks the engine with a fixed answer; records the questions."""
    asked: list[str] = []

    def grade(engine: Any, task: Task, conversations: list[Conversation], **options: Any) -> list[bool]:
        questions = [str(conversation["messages"][0]["content"]) for conversation in conversations]
        asked.extend(questions)
        if "3" in questions and engine is not None:
            raise UserError(engine)
        return [question in "01" for question in questions]

    monkeypatch.setattr(chat_core, "grade", grade)
    return asked


def test_results_are_kept_task_by_task_and_continued(tmp_path: Path, graded: list[str]) -> None:
    path = tmp_path / "eval.json"
    tasks: dict[str, Task] = {"first": Echo(stop=2), "second": Echo()}
    failed = dict(evaluate_tasks(policy("out of questions"), tasks, path))
    assert failed["first"]["accuracy"] == 1 and failed["second"]["error"] == "out of questions"
    assert json.loads(path.read_text()).keys() == {"first", "second"}
    graded.clear()
    results = dict(evaluate_tasks(policy(), tasks, path))
    assert graded == list("01234")  # only the task that had failed
    assert results["second"]["accuracy"] == 0.4 and results["second"]["interval_95"] == list(wilson_interval(2, 5))
    graded.clear()
    assert dict(evaluate_tasks(policy(), tasks, path)) == results
    assert not graded
    dict(evaluate_tasks(policy(), {"second": Echo(stop=4)}, path))
    assert graded == list("0123")  # other settings give another result


def test_the_mean_is_centered_by_chance_and_has_an_interval() -> None:
    results = {
        "MMLU": {"accuracy": 0.25, "centered": 0.0, "questions": 40},
        "GSM8K": {"accuracy": 0.5, "centered": 0.5, "questions": 10},
        "ARC-Easy": {"accuracy": 1.0, "centered": 1.0, "questions": 4},
    }
    mean = summary(results)
    assert mean is not None and mean["centered"] == pytest.approx((0 + 0.5 + 1) / 3)
    assert mean["interval_95"] == list(bootstrap_interval([10, 5, 4], [40, 10, 4], [0.25, 0.0, 0.25]))
    assert summary({**results, "ARC-Challenge": {"error": "x"}}) is None
    assert summary({}) is None


def test_the_bootstrap_resamples_the_questions_of_each_task() -> None:
    outcomes, baselines = [np.repeat([1, 0], [12, 18]), np.repeat([1, 0], [30, 10])], [0.25, 0.0]
    rng, means = np.random.default_rng(1), []
    for _ in range(20_000):
        shares = [rng.choice(outcome, len(outcome)).mean() for outcome in outcomes]
        means.append(np.mean([(share - base) / (1 - base) for share, base in zip(shares, baselines, strict=True)]))
    found = bootstrap_interval([12, 30], [30, 40], baselines, replicates=20_000)
    assert found == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.01)
    assert bootstrap_interval([0, 4], [9, 4], [0.0, 0.25]) == (0.5, 0.5)


def test_answers_that_are_programs_are_run(shared_data: Path) -> None:
    task = HumanEval(path=str(shared_data / "humaneval" / "HumanEval.jsonl.gz"), stop=3)
    solutions = [str(conversation["messages"][1]["content"]) for conversation in task]
    tokenizer = Tokenizer({bytes([byte]): byte for byte in range(256)})

    def generate(prompts: list[list[int]], params: SamplingParams) -> list[list[SimpleNamespace]]:
        assert len(prompts) == 3 and params.temperature == 0
        answers = [solutions[0], "def other(): pass", f"```python\n{solutions[2]}\n```"]
        return [[SimpleNamespace(content=tokenizer.encode(answer))] for answer in answers]

    engine: Any = SimpleNamespace(generate=generate, tokenizer=tokenizer)
    assert grade(engine, task, list(task), sandbox=Sandbox(allow_weak=True)) == [True, False, True]
    with pytest.raises(UserError, match="are programs; use lmchat eval"):
        check_graded(task)


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no task 'GSM9K'; choose from ARC-Easy"):
        make_task("GSM9K")
    for text in ("[1]", '{"a": 1}', "{", "[" * 100_000):
        (tmp_path / "eval.json").write_text(text)
        with pytest.raises(UserError, match="not a results file"):
            list(evaluate_tasks(policy(), {"a": Echo()}, tmp_path / "eval.json"))
