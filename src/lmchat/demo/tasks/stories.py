"""The stories of arithmetic word problems; texts and rules are in ``stories.yaml``."""

from dataclasses import dataclass, field
from typing import Literal

from lmchat.yaml_loading import load_package_yaml

Operation = Literal["+", "-", "*", "/", "total"]

WORKING: dict[Operation, str] = {
    "+": "Adding gives",
    "-": "Taking away leaves",
    "*": "Multiplying gives",
    "/": "Dividing gives",
}
"""Words before a result in a solution, if neither step nor family has its own."""


@dataclass(frozen=True)
class Step:
    """One calculation: its sentence in the story and its wording in the solution.

    Attributes:
        op: operation on the quantity; ``total`` adds up the quantities of all persons of a relay.
        story: the sentence that describes it; empty if only the question asks for it.
        operand: the number, if the story uses a word for it, such as "twice".
        question: asks for the result of this step, which is then the last one; empty: the family's question.
        working: words before the result in the solution; empty: the family's.
        result: words for the result ``{r}`` in the solution; empty: the family's.
    """

    op: Operation
    story: str
    operand: int | None = None
    question: str = ""
    working: str = ""
    result: str = ""


@dataclass(frozen=True)
class Family:
    """Stories of one kind; their steps can follow each other in any order.

    Attributes:
        items: things that are counted, in the plural.
        openings: sentences that give the first number.
        starts: steps that may begin the story instead, with both their numbers.
        steps: steps that may follow.
        questions: questions for the final quantity.
        remaining: questions for the rest, in stories in which something is taken away.
        result: words for a result ``{r}`` in the solution.
        working: words before a result in the solution; empty: those of `WORKING`.
        relay: each step is about a different person from the one before.
    """

    items: list[str]
    openings: list[str]
    starts: list[Step]
    steps: list[Step]
    questions: list[str]
    remaining: list[str] = field(default_factory=list)
    result: str = "{r} {items}"
    working: str = ""
    relay: bool = False


_TEXTS = load_package_yaml("lmchat.demo.tasks", "stories.yaml")

FAMILIES: dict[str, Family] = {
    name: Family(**{**texts, **{key: [Step(**step) for step in texts[key]] for key in ("starts", "steps")}})
    for name, texts in _TEXTS["families"].items()
}
PRONOUNS: dict[str, str] = {person: pronoun for pronoun in ("she", "he") for person in _TEXTS[pronoun]}
"""The persons of the stories and their pronouns."""
