"""Generated word problems of adjustable difficulty in GSM8K's format, solved with the calculator."""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import add, floordiv, mul, sub
from typing import Any

from lmchat.demo.tasks.stories import FAMILIES, PRONOUNS, WORKING, Family, Operation, Step
from lmchat.tasks.base import GeneratedTask, Split, exchange, in_split, message_text, reward_in_words_of
from lmchat.tasks.gsm8k import AnswerRule, NumericAnswerTask, parse_answer
from lmchat.tasks.patterns import pick
from lmchat.types import Conversation, UserError

MAX_TRIES = 10_000
MAX_STEPS = 6
"""Maximum number of steps of a story; every family has at least as many different ones."""
START_SHARE = 0.5
"""Share of problems that start with a calculation, if the family has such starts."""
PRONOUN_SHARE = 0.5
"""Share of sentences about a person named before that use "he" or "she"."""
JOINED_SHARES = (0.2, 0.6)
"""Shares of the second and of later sentences that are joined to the previous one if possible, as in "Tom has 9 coins.
He finds 4 and loses 2"."""
CONJUNCTIONS = (" and ", " and then ", ", then ")
"""Between two halves of a sentence about the same person, who is named once."""
LINKS = (", and ", " and ")
"""Between other halves."""
SMALLEST_RESULT = 2
"""Minimum result, so that nouns are plural: "2 marbles"."""
OPERATORS = {"+": ("+", add), "-": ("-", sub), "*": ("*", mul), "/": ("//", floordiv)}
"""Operations of steps: operator in the calculator, and function."""


@dataclass(frozen=True)
class WordProblem:
    """A problem in GSM8K's format: the solution has calculator calls as ``<<12+5=17>>`` and ends in ``#### 17``.

    ``calculation`` is the calculation without the story.
    """

    question: str
    answer: str
    calculation: str


class _Impossible(Exception):
    """No number in the allowed range fits a step."""


@dataclass
class _Draft:
    """A problem under construction.

    ``turn`` is the person that the story is currently about, ``subject`` the one that the last sentence starts with,
    ``joined`` whether that sentence consists of two.
    """

    family: Family
    rng: random.Random
    items: str
    people: list[str]
    quantities: list[int]
    turn: int = 0
    subject: str = ""
    joined: bool = False
    taken: list[Step] = field(default_factory=list)
    story: list[str] = field(default_factory=list)
    working: list[str] = field(default_factory=list)
    expressions: list[str] = field(default_factory=list)

    def text(self, template: str, **numbers: int | str) -> str:
        """``template`` with people, items and ``numbers`` filled in."""
        who, prev = self.people[self.turn], self.people[self.turn - 1]
        return template.format(who=who, prev=prev, items=self.items, **numbers)

    def tell(self, pattern: str, **numbers: int) -> None:
        """Continues the story, in a new sentence or in the last one."""
        sentence = pick(pattern, self.rng)
        subject = self.people[self.turn] if sentence.startswith("{who} ") else ""
        share = JOINED_SHARES[len(self.story) > 1]
        self.joined = bool(self.story) and not self.joined and self.rng.random() < share
        if self.joined:
            link = self.rng.choice(LINKS)
            if subject and subject == self.subject:
                link, sentence = self.rng.choice(CONJUNCTIONS), sentence.removeprefix("{who} ")
            continued = self.text(sentence[0].lower() + sentence[1:], **numbers)
            self.story[-1] = self.story[-1].removesuffix(".") + link + continued
        else:
            if subject and self._draw_pronoun():
                sentence = PRONOUNS[subject] + sentence.removeprefix("{who}")
            text = self.text(sentence, **numbers)
            self.story.append(text[0].upper() + text[1:])
        self.subject = subject

    def questions(self) -> list[str]:
        """The questions that fit the current story."""
        taken_away = any(step.op in ("-", "/") for step in self.taken)
        return self.family.questions + (self.family.remaining if taken_away else [])

    def ask(self, pattern: str) -> None:
        """Ends the story with a question."""
        question = pick(pattern, self.rng)
        if self._draw_pronoun():
            question = re.sub(r"(does|did) \{who\}", rf"\1 {PRONOUNS[self.people[self.turn]]}", question)
        self.story.append(self.text(question))

    def _draw_pronoun(self) -> bool:
        """Whether to use "he" or "she"; drawn at random if the person was named before and is the only one."""
        named = any(self.people[self.turn] in sentence for sentence in self.story)
        return named and not self.family.relay and self.rng.random() < PRONOUN_SHARE

    def calculate(self, step: Step, expression: str, result: int) -> None:
        """Adds the calculation of ``step`` to the solution: ``expression`` for the calculator, and its ``result``."""
        words = self.text(step.result or self.family.result, r=f"<<{expression}={result}>>{result}")
        self.working.append(f"{self.text(step.working or self.family.working or WORKING[step.op])} {words}.")
        self.taken.append(step)
        self.expressions.append(expression)
        self.quantities.append(result)


class Arithmetic(GeneratedTask, NumericAnswerTask):
    """Word problems of one to four steps, and their solutions with a calculator call for each step.

    Divisions have no remainder and are written ``//`` in the calls, so that the calculator returns an integer (``48/2``
    would give 24.0). The calculations of the splits are disjoint.

    Args:
        split: train or test; no calculation is in both, whatever the other options.
        size: number of problems.
        steps: minimum and maximum number of calculations.
        operands: smallest and largest number to start with, to add or to subtract.
        factors: smallest and largest number to multiply or divide by.
        max_value: largest result.
        families: kinds of stories by name, see `stories.FAMILIES`; null is all.
        seed: other seeds give other problems.
        answer_rule: how answers are compared, see `gsm8k.answers_match`.
        slice: see `Task`.
    """

    def __init__(
        self,
        split: Split = "train",
        size: int = 10_000,
        steps: tuple[int, int] = (1, 4),
        operands: tuple[int, int] = (2, 50),
        factors: tuple[int, int] = (2, 9),
        max_value: int = 10_000,
        families: list[str] | None = None,
        seed: int = 0,
        answer_rule: AnswerRule = "number",
        **slice: Any,
    ) -> None:
        super().__init__(split, size, seed, **slice)
        _check_range("steps", steps, 1, MAX_STEPS)
        _check_range("operands", operands, 1, max_value)
        _check_range("factors", factors, 2, max_value)
        unknown = sorted(set(families or ()) - set(FAMILIES))
        if unknown or families == []:
            raise UserError(f"arithmetic: families {families} are unknown or none; choose from {', '.join(FAMILIES)}")
        self.steps = steps
        self.operands = operands
        self.factors = factors
        self.max_value = max_value
        self.families = [FAMILIES[name] for name in families or FAMILIES]
        self.answer_rule = answer_rule

    @property
    def name(self) -> str:
        return super().name + (f"/{len(self.families)} families" if len(self.families) < len(FAMILIES) else "")

    def example(self, index: int) -> Conversation:
        problem = self.problem(index)
        return exchange(problem.question, parse_answer(problem.answer))

    def reward(self, conversation: Conversation, completion: str) -> float:
        """See `base.reward_in_words_of`; words of the question and of solutions are allowed."""
        question = str(conversation["messages"][-2]["content"])
        known = (question, message_text(conversation["messages"][-1]), "dollars", *WORKING.values())
        return reward_in_words_of(self.evaluate(conversation, completion), completion, *known)

    def problem(self, index: int) -> WordProblem:
        """The problem at ``index`` before slicing; depends only on the index and the options."""
        rng = self.rng(index)
        for _ in range(MAX_TRIES):
            try:
                problem = self._compose(rng)
            except _Impossible:
                continue
            if in_split(problem.calculation, self.split):
                return problem
        raise UserError(
            f"arithmetic: found no {self.split} problem with steps={self.steps}, operands={self.operands}, "
            f"factors={self.factors}, max_value={self.max_value}; widen the ranges"
        )

    def _compose(self, rng: random.Random) -> WordProblem:
        """A problem of either split. Raises `_Impossible` if no numbers fit."""
        family = rng.choice(self.families)
        num_steps = rng.randint(*self.steps)
        people = rng.sample(tuple(PRONOUNS), num_steps + 1)
        draft = _Draft(family, rng, rng.choice(family.items), people, [rng.randint(*self.operands)])
        question = self._begin(draft, num_steps)
        while len(draft.expressions) < num_steps:
            question = self._continue(draft, num_steps)
        draft.ask(question or rng.choice(draft.questions()))
        solution = "\n".join([*draft.working, f"#### {draft.quantities[-1]}"])
        return WordProblem(" ".join(draft.story), solution, " ".join(draft.expressions))

    def _begin(self, draft: _Draft, num_steps: int) -> str:
        """Writes the first sentence, which may be a step. Returns the step's question, if any."""
        starts = [step for step in draft.family.starts if num_steps == 1 or not step.question]
        if starts and draft.rng.random() < START_SHARE:
            return self._take(draft, draft.rng.choice(starts))
        draft.tell(draft.rng.choice(draft.family.openings), a=draft.quantities[0])
        return ""

    def _continue(self, draft: _Draft, num_steps: int) -> str:
        """Writes the next step; operations are equally likely. Returns the step's question, if any."""
        last = len(draft.expressions) == num_steps - 1
        possible = [
            step
            for step in draft.family.steps
            if step not in draft.taken
            and (last or not step.question)
            and (len(draft.quantities) > 1 or step.op != "total")
        ]
        op = draft.rng.choice(sorted({step.op for step in possible}))
        if draft.family.relay and op != "total":
            draft.turn += 1
        return self._take(draft, draft.rng.choice([step for step in possible if step.op == op]))

    def _take(self, draft: _Draft, step: Step) -> str:
        quantity = draft.quantities[-1]
        operand = draft.rng.choice(self._operands(step, quantity))
        if step.op == "total":
            expression, result = "+".join(map(str, draft.quantities)), sum(draft.quantities)
        else:
            operator, function = OPERATORS[step.op]
            expression, result = f"{quantity}{operator}{operand}", function(quantity, operand)
        if not SMALLEST_RESULT <= result <= self.max_value:
            raise _Impossible
        if step.story:
            draft.tell(step.story, a=quantity, n=operand)
        draft.calculate(step, expression, result)
        return step.question

    def _operands(self, step: Step, quantity: int) -> Sequence[int]:
        """The numbers that a step may take."""
        low, high = self.operands
        factors = [step.operand] if step.operand else range(self.factors[0], self.factors[1] + 1)
        choices: dict[Operation, Sequence[int]] = {
            "+": range(low, high + 1),
            "-": range(low, min(high, quantity - SMALLEST_RESULT) + 1),
            "*": factors,
            "/": [factor for factor in factors if quantity % factor == 0],
            "total": [0],
        }
        if not choices[step.op]:
            raise _Impossible
        return choices[step.op]


def _check_range(name: str, limits: tuple[int, int], min: int, max: int) -> None:
    if not min <= limits[0] <= limits[1] <= max:
        raise UserError(f"arithmetic: {name}={list(limits)} is not possible; use [low, high] within {min} to {max}")
