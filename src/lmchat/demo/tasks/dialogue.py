"""Conversations of several turns, joined from examples of other tasks."""

import random
from functools import cached_property
from typing import Any, cast

from lmchat.option_checks import check_count
from lmchat.tasks.base import Graded, Task, graded
from lmchat.types import Conversation, Message, UserError


class DialogueConversation(Conversation):
    """A conversation, and the indices of its last question's task and example."""

    last: tuple[int, int]


class Dialogue(Task, Graded):
    """Conversations that join a random number of shuffled examples of several tasks.

    Every example is in exactly one conversation. Only the first system message of a conversation is kept. The answer to
    the last question is graded by its task.

    Args:
        tasks: tasks that the examples come from.
        max_examples: maximum number of examples in a conversation; all numbers from 1 are equally likely.
        seed: seed of the order and of the numbers.
        slice: see `Task`.
    """

    def __init__(self, tasks: list[Task], max_examples: int = 3, seed: int = 0, **slice: Any) -> None:
        super().__init__(**slice)
        check_count(None, 1, **{"dialogue: number of tasks": len(tasks), "dialogue: max_examples": max_examples})
        self.tasks = tasks
        self.max_examples = max_examples
        self.seed = seed

    @cached_property
    def _conversations(self) -> list[list[tuple[int, int]]]:
        """For each conversation, the indices of task and example of its parts."""
        rng = random.Random(f"{self.seed}")
        examples = [(number, index) for number, task in enumerate(self.tasks) for index in range(len(task))]
        rng.shuffle(examples)
        conversations = []
        while examples:
            size = rng.randint(1, self.max_examples)
            conversations.append(examples[-size:])
            del examples[-size:]
        return conversations

    def num_examples(self) -> int:
        return len(self._conversations)

    def example(self, index: int) -> DialogueConversation:
        parts = [self._messages(number, example) for number, example in self._conversations[index]]
        later = [[message for message in part if message["role"] != "system"] for part in parts[1:]]
        return {"messages": sum(later, parts[0]), "last": self._conversations[index][-1]}

    def _messages(self, number: int, example: int) -> list[Message]:
        task = self.tasks[number]
        messages = task[example]["messages"]
        if messages[-1]["role"] != "assistant":
            raise UserError(
                f"conversation {example} of {task.name} ends with a message of the {messages[-1]['role']}, after which "
                "a dialogue cannot continue; remove it, or remove the task from the dialogue"
            )
        return messages

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        task, example = self._last(conversation)
        return graded(task).evaluate(example, completion)

    def reward(self, conversation: Conversation, completion: str) -> float:
        task, example = self._last(conversation)
        return graded(task).reward(example, completion)

    def _last(self, conversation: Conversation) -> tuple[Task, Conversation]:
        number, index = cast(DialogueConversation, conversation)["last"]
        return self.tasks[number], self.tasks[number][index]
