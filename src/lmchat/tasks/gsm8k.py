"""GSM8K: grade-school word problems solved with a calculator (Cobbe et al. 2021, arXiv:2110.14168)."""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation
from typing import Any, Literal

from lmchat.tasks.base import Task, reference_answer
from lmchat.tasks.row_files import MalformedRow
from lmchat.tasks.rows import HubDataset, RowTask, field
from lmchat.types import Conversation, Part

AnswerRule = Literal["number", "string"]

_ANSWER = re.compile(r"#### (-?[0-9.,]+)")
_CALL = re.compile(r"(<<[^>]+>>)")


def extract_answer(text: str) -> str | None:
    """What follows the first ``#### ``, without its commas; None where no number does."""
    match = _ANSWER.search(text)
    return match.group(1).replace(",", "") if match else None


def answers_match(reference: str, completion: str, rule: AnswerRule = "number") -> bool:
    """Whether two texts give the same answer after ``####``.

    Args:
        reference: the text with the right answer.
        completion: the text to grade.
        rule: ``number`` compares values, and no answer is wrong. ``string`` is the reference's rule: characters are
            compared, so "10" is not "10.0", and two texts without an answer agree.
    """
    expected, given = extract_answer(reference), extract_answer(completion)
    if rule == "string":
        return expected == given
    value = _value(given)
    return value is not None and value == _value(expected)


def _value(answer: str | None) -> Decimal | None:
    try:
        return None if answer is None else Decimal(answer)
    except InvalidOperation:  # "1.2.3"
        return None


def parse_answer(answer: str) -> list[Part]:
    """A solution as parts: each ``<<48/2=24>>`` is a calculator call and its output, the rest is text."""
    return [part for piece in _CALL.split(answer) for part in _piece(piece)]


def _piece(piece: str) -> list[Part]:
    if not _CALL.fullmatch(piece):
        return [{"type": "text", "text": piece}]
    expression, equals, result = piece[2:-2].rpartition("=")
    if not equals:
        expression, result = result, ""
    return [{"type": "python", "text": expression}, {"type": "python_output", "text": result}]


def word_problem(question: str, answer: str) -> Conversation:
    """The conversation of a problem whose solution is in GSM8K's format."""
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": parse_answer(answer)},
        ]
    }


class NumericAnswerTask(Task):
    """A task whose answers end in ``#### number``."""

    answer_rule: AnswerRule = "number"

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        """Whether the completion ends in the reference's number, see `answers_match`."""
        return answers_match(reference_answer(conversation), completion, self.answer_rule)


class GSM8K(NumericAnswerTask, RowTask):
    """The 7,473 training and 1,319 test problems, with the calculator calls of their solutions.

    Of the 23,716 calls in the training solutions 24 % have a whole result, such as 48/2 = 24, that the calculator, like
    the reference's, prints as 24.0 when the model makes the call. Both are kept as the reference has them: the result
    carries no loss, so nothing wrong is learned, and answers are compared as numbers. `Arithmetic` divides with ``//``
    and has no such difference.
    """

    def __init__(
        self,
        split: Literal["train", "test"] = "train",
        path: str | None = None,
        answer_rule: AnswerRule = "number",
        **options: Any,
    ) -> None:
        """Choose the split.

        Args:
            split: part of the data set.
            path: a local copy, see `RowTask`.
            answer_rule: how answers are compared, see `answers_match`.
            options: see `RowTask`.
        """
        super().__init__(hub=HubDataset("openai/gsm8k", "main", split), path=path, **options)
        self.answer_rule = answer_rule

    def conversation(self, row: Any) -> Conversation:
        question, answer = field(row, "question", str), field(row, "answer", str)
        if _value(extract_answer(answer)) is None:
            raise MalformedRow("field 'answer' has no number after '#### '")
        return word_problem(question, answer)
