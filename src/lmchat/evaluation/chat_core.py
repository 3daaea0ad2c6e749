"""Chat benchmarks by name, and ChatCORE as an `Evaluator`: in training and in ``lmchat eval``."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from lmchat.evaluation.benchmark import Benchmark
from lmchat.evaluation.chat_tasks import grade, question_batches
from lmchat.evaluation.results import Result
from lmchat.evaluation.sandbox import Sandbox
from lmchat.generation.policy import Policy
from lmchat.tasks import ARC, GSM8K, MMLU, HumanEval, SimpleSpelling, SpellingBee, Task
from lmchat.tasks.base import GradedByTests, MultipleChoice
from lmchat.types import Conversation, UserError

TASKS: dict[str, Callable[..., Task]] = {
    "ARC-Easy": lambda **options: ARC("ARC-Easy", "test", **options),
    "ARC-Challenge": lambda **options: ARC("ARC-Challenge", "test", **options),
    "MMLU": lambda **options: MMLU("test", skip_malformed=True, **options),
    "GSM8K": lambda **options: GSM8K("test", **options),
    "HumanEval": HumanEval,
    "SpellingBee": lambda path=None, **options: SpellingBee("test", 256, path, **options),
    "SimpleSpelling": lambda path=None, **options: SimpleSpelling("test", 256, path, **options),
}
"""Tasks by name; ``path`` is a local copy of the data, or for the spelling tasks a word list."""
CHAT_CORE = ("ARC-Easy", "ARC-Challenge", "MMLU", "GSM8K", "HumanEval", "SpellingBee")
"""The tasks of ChatCORE."""
CHANCE = {"ARC-Easy": 0.25, "ARC-Challenge": 0.25, "MMLU": 0.25}
"""Accuracy of random answers; 0 for other tasks."""


def make_task(name: str, limit: int | None = None) -> Task:
    """Creates the task given as ``NAME`` or ``NAME=PATH``, with at most ``limit`` questions.

    Raises:
        UserError: there is no such task.
    """
    name, _, path = name.partition("=")
    if name not in TASKS:
        raise UserError(f"there is no task {name!r}; choose from {', '.join(TASKS)}")
    return TASKS[name](path=path or None, stop=limit)


def make_tasks(specs: Sequence[str] | None, limit: int | None, sandbox: Sandbox) -> dict[str, Task]:
    """The tasks by name, by default those of ChatCORE. See `make_task`.

    Raises:
        UserError: there is no such task, or programs would be run and the kernel refuses a protection.
    """
    tasks = {spec.partition("=")[0]: make_task(spec, limit) for spec in specs or CHAT_CORE}
    if any(isinstance(task, GradedByTests) for task in tasks.values()):
        sandbox.require()
    return tasks


class ChatCoreEvaluator(Benchmark):
    """Accuracy on each task as ``chat_core/TASK``, and the mean of the centered accuracies as ``chat_core``.

    Args:
        batch_size: number of multiple-choice questions per batch. The other questions of a task are one request each
            to the engine, which batches them.
        max_new_tokens: maximum number of new tokens of an answer.
        every_n_steps, device: see `Benchmark`.
    """

    name = "chat_core"
    mean_name = "ChatCORE"

    def __init__(
        self,
        tasks: Mapping[str, Task],
        *,
        batch_size: int = 32,
        max_new_tokens: int = 256,
        sandbox: Sandbox | None = None,
        every_n_steps: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__({name: CHANCE.get(name, 0.0) for name in tasks}, every_n_steps, device)
        self.tasks = list(tasks.values())
        self.batch_size = batch_size
        self.max_new_tokens = max_new_tokens
        self.sandbox = sandbox

    def task_batches(self, number: int, rank: int, world_size: int) -> Iterator[list[Conversation]]:
        task = self.tasks[number]
        size = self.batch_size if isinstance(task, MultipleChoice) else max(1, len(task))
        return question_batches(task, size, rank, world_size)

    def score_batch(self, policy: Policy, number: int, examples: Sequence[Conversation]) -> tuple[int, int]:
        task, limit = self.tasks[number], self.max_new_tokens
        return sum(grade(policy.engine, task, examples, max_new_tokens=limit, sandbox=self.sandbox)), 0

    def settings(self, number: int) -> Result:
        task = self.tasks[number]
        return {
            "limit": task.slice.stop,
            "max_new_tokens": self.max_new_tokens,
            "path": getattr(task, "path", None),
        }
