"""Multiple choice tasks: prompt, letters and grading; ARC and MMLU."""

from collections.abc import Sequence
from string import ascii_uppercase
from typing import Any, Literal, cast

from lmchat.tasks.base import MultipleChoice, exchange, reference_answer
from lmchat.tasks.row_files import MalformedRow
from lmchat.tasks.rows import HubDataset, RowTask, field, nonempty_text
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


class ARC(MultipleChoiceTask):
    """ARC: grade-school science questions (Clark et al. 2018, arXiv:1803.05457), the easy or the challenge ones.

    Questions keep their own letters, which may be digits.

    Args:
        subset: which questions.
        split: part of the dataset.
        options: see `RowTask`.
    """

    def __init__(
        self,
        subset: Literal["ARC-Easy", "ARC-Challenge"] = "ARC-Easy",
        split: Literal["train", "validation", "test"] = "test",
        **options: Any,
    ) -> None:
        super().__init__(hub=HubDataset("allenai/ai2_arc", subset, split), **options)
        self.subset = subset

    @property
    def name(self) -> str:
        return super().name.replace("ARC", self.subset)

    def conversation(self, row: Any) -> MultipleChoiceConversation:
        choices = field(row, "choices", dict)
        letters, texts = field(choices, "label", list), field(choices, "text", list)
        return self.question(field(row, "question", str), letters, texts, field(row, "answerKey", str))


class MMLU(MultipleChoiceTask):
    """MMLU: questions of 57 subjects (Hendrycks et al. 2020, arXiv:2009.03300).

    ``auxiliary_train`` has 100 K training questions of other datasets.

    Args:
        split: part of the dataset.
        options: see `RowTask`.
    """

    def __init__(self, split: Literal["auxiliary_train", "dev", "validation", "test"] = "test", **options: Any) -> None:
        super().__init__(hub=HubDataset("cais/mmlu", "all", split), **options)

    def conversation(self, row: Any) -> MultipleChoiceConversation:
        if isinstance(row, dict) and set(row) == {"train"}:  # rows of auxiliary_train are wrapped on the Hub
            row = row["train"]
        question, choices = field(row, "question", str), field(row, "choices", list)
        letters, answer = ascii_uppercase[: len(choices)], field(row, "answer", int)
        if not 0 <= answer < len(letters):
            raise MalformedRow(f"the answer {answer} is not an index into {len(choices)} choices")
        return self.question(question, letters, choices, letters[answer])
