"""GSM8K: grade-school word problems solved with a calculator (Cobbe et al. 2021, arXiv:2110.14168)."""

import re
from fractions import Fraction
from typing import Any, Literal

from lmchat.tasks.base import Graded, Task, exchange, reference_answer
from lmchat.tasks.row_files import MalformedRow
from lmchat.tasks.rows import HubDataset, RowTask, field
from lmchat.types import Conversation, Part

AnswerRule = Literal["number", "string"]

_ANSWER = re.compile(r"#### (-?[0-9.,]+)")
_ANSWER_LINE = re.compile(r"#### ([^\n]*)")
_END_OF_ANSWER = re.compile(r"<\|assistant_end\|>.*")
_NUMBER = re.compile(
    r"""(?P<sign>[+\-−])?
    (?:(?P<whole>[0-9]+)[ ])?(?P<numerator>[0-9]+)/(?P<denominator>[0-9]+)  # 3/4 and 2 1/2
    |(?P<sign_>[+\-−])?
    (?P<decimal>(?:[0-9]+|[1-9][0-9]{0,2}(?P<group>[,\ \u00a0\u2009\u202f])[0-9]{3}(?:(?P=group)[0-9]{3})*)
      (?:\.[0-9]*)?|\.[0-9]+)
    (?:[eE](?P<exponent>[+\-]?[0-9]{1,3}))?\.?""",
    re.VERBOSE,
)
_AMBIGUOUS = re.compile(r"[1-9][0-9]{0,2}\.[0-9]{2}0")
"""A number with three decimals that ends in 0, such as 1.000, may mean thousands."""
_GROUPED_NUMERATOR = re.compile(r"\D?[1-9][0-9]{0,2} [0-9]{3}/")
"""1 250/500 may mean 1250/500."""
_MAX_NUMBER_CHARACTERS = 100
_CALL = re.compile(r"(<<[^>]+>>)")


def extract_answer(text: str) -> str | None:
    """The digits after the first ``#### `` without commas, extracted as in nanochat; None if there are none.

    The rest of the line is ignored: ``#### 3/4`` gives ``3``. `answer_number` parses the whole number.
    """
    match = _ANSWER.search(text)
    return match.group(1).replace(",", "") if match else None


def answers_match(reference: str, completion: str, rule: AnswerRule = "number") -> bool:
    """Whether two texts give the same answer after ``####``.

    Args:
        reference: text with the correct answer.
        completion: text to grade.
        rule: ``number`` compares the values of `answer_number`; a text without a number is wrong. ``string`` is
            nanochat's rule: it compares the strings of `extract_answer`, so "10" differs from "10.0", and two texts
            without an answer agree.
    """
    if rule == "string":
        return extract_answer(reference) == extract_answer(completion)
    value = answer_number(completion)
    return value is not None and value == answer_number(reference)


def answer_number(text: str) -> Fraction | None:
    """The number that the line after the first ``#### `` consists of.

    Accepts integers, decimals, grouped thousands (``1,234`` or ``1 234``), fractions (``3/4``, ``2 1/2``) and exponents
    (``1e3``). Returns None for anything else, such as ``10,5``, ``3:30``, ``50%``, ``5-3`` or ``42 apples``, and for
    the ambiguous ``1.000`` and ``1 250/500``.
    """
    line = _ANSWER_LINE.search(text)
    if not line:
        return None
    written = _END_OF_ANSWER.sub("", line[1]).strip()
    found = _NUMBER.fullmatch(written) if len(written) <= _MAX_NUMBER_CHARACTERS else None
    if not found:
        return None
    sign = -1 if (found["sign"] or found["sign_"] or "+") in "-−" else 1
    if found["numerator"]:
        whole, numerator, denominator = (int(found[part] or 0) for part in ("whole", "numerator", "denominator"))
        is_improper = whole and numerator >= denominator
        if denominator == 0 or is_improper or _GROUPED_NUMERATOR.match(found[0]):
            return None
        return sign * (whole + Fraction(numerator, denominator))
    decimal = found["decimal"]
    if _AMBIGUOUS.fullmatch(decimal):
        return None
    digits = re.sub(r"[^0-9.]", "", decimal)
    return sign * Fraction(digits.removesuffix(".")) * Fraction(10) ** int(found["exponent"] or 0)


def parse_answer(answer: str) -> list[Part]:
    """Splits a solution into parts: each ``<<48/2=24>>`` is a calculator call and its output, the rest is text."""
    parts: list[Part] = []
    for piece in _CALL.split(answer):
        if _CALL.fullmatch(piece):
            call = piece[2:-2]
            expression, _, result = call.rpartition("=") if "=" in call else (call, "", "")
            parts += [{"type": "python", "text": expression}, {"type": "python_output", "text": result}]
        else:
            parts.append({"type": "text", "text": piece})
    return parts


class NumericAnswerTask(Task, Graded):
    """A task whose answers end in ``#### number``."""

    answer_rule: AnswerRule = "number"

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        """Whether the completion has the correct answer, see `answers_match`."""
        return answers_match(reference_answer(conversation), completion, self.answer_rule)


class GSM8K(NumericAnswerTask, RowTask):
    """The 7,473 training and 1,319 test problems, with the calculator calls of their solutions.

    In 24 % of the 23,716 calls of the training solutions the result is an integer, such as 48/2 = 24, that the
    calculator prints as 24.0. As in nanochat, the data are not changed: results have no loss, and answers are compared
    as numbers. `Arithmetic` avoids the difference by dividing with ``//``.

    Args:
        split: part of the dataset.
        answer_rule: how answers are compared, see `answers_match`.
        options: see `RowTask`.
    """

    def __init__(
        self, split: Literal["train", "test"] = "train", answer_rule: AnswerRule = "number", **options: Any
    ) -> None:
        super().__init__(hub=HubDataset("openai/gsm8k", "main", split), **options)
        self.answer_rule = answer_rule

    def conversation(self, row: Any) -> Conversation:
        question, answer = field(row, "question", str), field(row, "answer", str)
        known = extract_answer(answer) if self.answer_rule == "string" else answer_number(answer)
        if known is None:
            raise MalformedRow("field 'answer' has no number after '#### ', such as 72, 1,250, 0.5, 3/4 or 2 1/2")
        return exchange(question, parse_answer(answer))
