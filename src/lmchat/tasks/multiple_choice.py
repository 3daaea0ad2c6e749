"""Base class of multiple choice tasks: prompt, letters, grading."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from lmchat.tasks.base import MultipleChoice, exchange, reference_answer
from lmchat.tasks.row_files import MalformedRow
from lmchat.tasks.rows import RowTask, nonempty_text
from lmchat.types import Conversation


class MultipleChoiceConversation(Conversation):
    """A question, the letter of its answer, and all its letters."""

    letters: list[str]


def render_multiple_choice(question: str, letters: Sequence[str], choices: Sequence[str]) -> str:
    """The prompt of a multiple choice question.

    As in nanochat, letters follow their choice, which is easier for small models, and have no space before them, so
    that they are the same token as in the answer.
    """
    listed = "".join(f"- {choice}={letter}\n" for letter, choice in zip(letters, choices, strict=True))
    return f"Multiple Choice question: {question}\n{listed}\nRespond only with the letter of the correct answer."


class MultipleChoiceTask(RowTask, MultipleChoice):
    """A task whose answer is one letter."""

    def question(
        self, question: str, letters: Sequence[str], choices: Sequence[str], answer: str
    ) -> MultipleChoiceConversation:
        """The conversation of a question. Raises `MalformedRow` if choices, letters and answer do not match."""
        for letter in letters:
            nonempty_text(letter, "a choice's letter")
        if len(choices) < 2 or len(choices) != len(set(letters)):
            raise MalformedRow(f"{len(choices)} choices with the letters {', '.join(letters)}")
        for letter, choice in zip(letters, choices, strict=True):
            nonempty_text(choice, f"choice {letter}")
        if answer not in letters:
            raise MalformedRow(f"the answer {answer} is not one of the letters {', '.join(letters)}")
        messages = exchange(render_multiple_choice(question, letters, choices), answer)["messages"]
        return {"messages": messages, "letters": list(letters)}

    def letters(self, conversation: Conversation) -> list[str]:
        return cast(MultipleChoiceConversation, conversation)["letters"]

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        """Whether the completion is the correct letter and nothing else."""
        return completion.strip() == reference_answer(conversation)
