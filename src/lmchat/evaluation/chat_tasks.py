"""Answers to a task's questions, and whether they are right."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch.utils.data import IterableDataset

from lmchat.generation.engine import Engine
from lmchat.tasks.base import Task
from lmchat.tokenizer.render import render_for_completion
from lmchat.types import Conversation


class Questions:
    """Some questions of one task, for one pass of the engine. Lightning would copy a dataclass to the device."""

    def __init__(self, task: Task, conversations: list[Conversation]) -> None:
        self.task = task
        self.conversations = conversations


class TaskQuestions(IterableDataset[Questions]):
    """One rank's share of the questions of some tasks, in batches.

    Args:
        tasks: asked one after the other; rank r of W asks questions r, r + W, … of each. A rank for which there is
            none gets a batch without questions, since a metric is summed over ranks only where all of them log it.
        batch_size: questions per batch.
    """

    def __init__(self, tasks: Sequence[Task], *, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        self.tasks = list(tasks)
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size

    def __iter__(self) -> Iterator[Questions]:
        for task in self.tasks:
            own = range(self.rank, len(task), self.world_size)
            for start in range(0, max(1, len(own)), self.batch_size):
                yield Questions(task, [task[index] for index in own[start : start + self.batch_size]])


def grade(engine: Engine, questions: Questions, *, max_new_tokens: int = 256) -> list[bool]:
    """Whether each question is answered right: sampled greedily, or by the likeliest letter for categorical tasks."""
    task, conversations = questions.task, questions.conversations
    if task.kind == "categorical":
        answers = _likeliest_letters(engine, questions)
    else:
        answers = _greedy_answers(engine, conversations, max_new_tokens)
    return [task.evaluate(*pair) for pair in zip(conversations, answers, strict=True)]


def _greedy_answers(engine: Engine, conversations: Sequence[Conversation], max_new_tokens: int) -> list[str]:
    prompts = [render_for_completion(engine.tokenizer, conversation) for conversation in conversations]
    samples = engine.generate(prompts, temperature=0.0, max_new_tokens=max_new_tokens)
    return [engine.tokenizer.decode(completions[0].content) for completions in samples]


def _likeliest_letters(engine: Engine, questions: Questions) -> list[str]:
    if not questions.conversations:
        return []
    tokenizer = engine.tokenizer
    prompts = [render_for_completion(tokenizer, conversation) for conversation in questions.conversations]
    answers = []
    for conversation, logits in zip(questions.conversations, engine.next_logits(prompts).cpu(), strict=True):
        letters = questions.task.letters(conversation)
        scores = logits[[tokenizer.encode(letter)[0] for letter in letters]]
        answers.append(letters[int(scores.argmax())])
    return answers
