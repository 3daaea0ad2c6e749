from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest

from lmchat.demo.tasks.arithmetic import MAX_STEPS, Arithmetic, WordProblem, _Draft
from lmchat.demo.tasks.stories import FAMILIES, PRONOUNS
from lmchat.generation.calculator import calculate
from lmchat.tasks.base import in_split, message_text
from lmchat.tasks.gsm8k import extract_answer, parse_answer
from lmchat.types import UserError

SHE, HE = ([person for person, each in PRONOUNS.items() if each == pronoun] for pronoun in ("she", "he"))

NUMBER_WORDS = {"half": 2, "twice": 2, "doubles": 2}


def problems(size: int, **options: Any) -> list[WordProblem]:
    task = Arithmetic(size=size, **options)
    return [task.problem(index) for index in range(size)]


def calls(problem: WordProblem) -> list[tuple[str, str]]:
    """Expressions and results of a solution."""
    return re.findall(r"<<([^=>]+)=([^>]+)>>", problem.answer)


def numbers_told(question: str) -> Counter[int]:
    """All numbers of a story, including those in words."""
    found = re.findall(r"\d+|\b(?:half|twice|doubles)\b", question.lower())
    return Counter(NUMBER_WORDS[number] if number in NUMBER_WORDS else int(number) for number in found)


@pytest.mark.parametrize("family", FAMILIES)
def test_solutions_use_the_numbers_of_the_story(family: str) -> None:
    """Each calculation uses the previous result and one new number from the story, which has no other numbers."""
    for problem in problems(400, families=[family]):
        told, used = numbers_told(problem.question), Counter[int]()
        quantities: list[int] = []
        for expression, result in calls(problem):
            operands = [int(number) for number in re.findall(r"\d+", expression)]
            if not quantities:
                used.update(operands)
                quantities = operands[:1]
            elif operands != quantities:  # not the total
                assert operands[0] == quantities[-1]
                used.update(operands[1:])
            quantities.append(int(result))
        assert used == told, problem


def test_the_calculator_gives_the_results_of_the_solutions() -> None:
    for problem in problems(2_000):
        for expression, result in calls(problem):
            assert calculate(expression) == result
            value = eval(expression)  # an independent calculator, on text of this test
            assert isinstance(value, int)
            assert value == int(result)
            if "//" in expression:
                dividend, divisor = map(int, expression.split("//"))
                assert dividend % divisor == 0
        assert extract_answer(problem.answer) == calls(problem)[-1][1]


def test_a_conversation_has_calls_as_parts() -> None:
    task = Arithmetic(size=200)
    for index, conversation in enumerate(task):
        problem = task.problem(index)
        assert conversation["messages"][0]["content"] == problem.question
        parts = conversation["messages"][1]["content"]
        assert isinstance(parts, list)
        assert parts == parse_answer(problem.answer)
        python = [part["text"] for part in parts if part["type"] == "python"]
        output = [part["text"] for part in parts if part["type"] == "python_output"]
        assert list(zip(python, output, strict=True)) == calls(problem)
        assert " ".join(python) == problem.calculation
        assert task.reward(conversation, f"... #### {output[-1]}.0") == 1.0
        assert task.reward(conversation, "...") == 0.0
        assert task.reward(conversation, message_text(conversation["messages"][-1])) == 1.0
        mumbled = re.sub(r" (?:gives|leaves|has|have|is|are) ", " mum ", message_text(conversation["messages"][-1]))
        assert task.evaluate(conversation, mumbled)
        assert task.reward(conversation, mumbled) == 0.5


# A solver that reads a story sentence by sentence, independent of the generator's tables.
Rule = tuple[str, Callable[[dict[str, int], list[Any]], None]]


def _relay(amounts: dict[str, int], person: str, value: int) -> None:
    assert person not in amounts
    amounts[person] = value


COMPARISONS: list[Rule] = [
    (r"(\w+) (?:has|brings|buys|finds) (\d+) \w+", lambda a, m: _relay(a, m[0], int(m[1]))),
    (
        r"(\w+) has (\d+) more(?: \w+)? than (\w+)",
        lambda a, m: _relay(a, m[0], a[m[2]] + int(m[1])) if m[2] in a else _relay(a, m[2], a[m[0]] - int(m[1])),
    ),
    (
        r"(\w+) has (\d+) fewer(?: \w+)? than (\w+)",
        lambda a, m: _relay(a, m[0], a[m[2]] - int(m[1])) if m[2] in a else _relay(a, m[2], a[m[0]] + int(m[1])),
    ),
    (
        r"(\w+) has (\d+) times as many(?: \w+)? as (\w+)",
        lambda a, m: _relay(a, m[0], a[m[2]] * int(m[1])) if m[2] in a else _relay(a, m[2], a[m[0]] // int(m[1])),
    ),
    (r"(\w+) has twice as many(?: \w+)? as (\w+)", lambda a, m: _relay(a, m[0], a[m[1]] * 2)),
    (r"(\w+) has half as many(?: \w+)? as (\w+)", lambda a, m: _relay(a, m[0], a[m[1]] // 2)),
    (r"How many \w+ does (\w+) have", lambda a, m: a.update(answer=a[m[0]])),
    (r"How many \w+ has (\w+)", lambda a, m: a.update(answer=a[m[0]])),
    (r"How many \w+ do (?:they|all of them) have .*", lambda a, m: a.update(answer=sum(a.values()))),
]


def _change(kind: str) -> Callable[[dict[str, int], list[Any]], None]:
    def change(amounts: dict[str, int], match: list[Any]) -> None:
        number = int(match[0]) if match else 2
        now = amounts["now"]
        amounts["now"] = {"+": now + number, "-": now - number, "*": now * number, "/": now // number}[kind]

    return change


BUS_RIDES: list[Rule] = [
    (r"A \w+ (?:leaves the station with|carries|has) (\d+) \w+", lambda a, m: a.update(now=int(m[0]))),
    (r"There are (\d+) \w+ on \w+'s (?:bus|train)", lambda a, m: a.update(now=int(m[0]))),
    (r"(\d+) \w+ sit and (\d+)(?: \w+)? stand on \w+'s bus", lambda a, m: a.update(now=int(m[0]) + int(m[1]))),
    (r"\w+ drives a train of (\d+) cars with (\d+) .*", lambda a, m: a.update(now=int(m[0]) * int(m[1]))),
    (r".*?(\d+) .*(?:get on|climb aboard).*", _change("+")),
    (r".*?(\d+) (?:\w+ |of them )?(?:get off|leave).*", _change("-")),
    (r".* half of .* get off", _change("/")),
    (r".* grows to (\d+) times as many", _change("*")),
    (r"(?:every one|each) of the \w+ on board pays \$(\d+)", _change("*")),
    (r".* form (\d+) equal groups", _change("/")),
    (r"How (?:many|much) .*", lambda a, m: a.update(answer=a["now"])),
]


def work_out(question: str, rules: list[Rule]) -> int:
    amounts: dict[str, int] = {}
    for sentence in re.split(r"[.?] |,? and (?!\d+(?: \w+)? stand)", question.removesuffix("?")):
        matches = [(rule, re.fullmatch(pattern, sentence, re.IGNORECASE)) for pattern, rule in rules]
        fitting = [(rule, match) for rule, match in matches if match]
        assert fitting, sentence
        rule, match = fitting[0]
        rule(amounts, list(match.groups()))
    return amounts["answer"]


@pytest.mark.parametrize(("family", "rules"), [("comparison", COMPARISONS), ("bus", BUS_RIDES)])
def test_answers_follow_from_the_text(family: str, rules: list[Rule]) -> None:
    for problem in problems(1_500, families=[family]):
        assert str(work_out(problem.question, rules)) == extract_answer(problem.answer), problem


def test_no_calculation_is_in_both_splits() -> None:
    """For all other options: RL problems of another difficulty cannot repeat a test problem either."""
    train = {problem.calculation for problem in problems(2_000, operands=(2, 9), steps=(1, 2))}
    train |= {problem.calculation for problem in problems(2_000, steps=(2, 4), seed=7, families=["bus", "ages"])}
    test = {problem.calculation for problem in problems(1_000, split="test", operands=(2, 9), steps=(1, 2))}
    assert len(test) > 200
    assert not train & test


def test_options_bound_the_numbers() -> None:
    options: dict[str, Any] = {"steps": (2, 3), "operands": (20, 99), "factors": (3, 4), "max_value": 500}
    lengths: Counter[int] = Counter()
    for problem in problems(1_000, families=["bus", "tank", "savings"], **options):
        lengths[len(calls(problem))] += 1
        for expression, result in calls(problem):
            assert 2 <= int(result) <= 500
            if found := re.fullmatch(r"\d+(?:\*|//)(\d+)", expression):
                assert int(found[1]) in (2, 3, 4)  # 2 for "half", "twice"
            elif found := re.fullmatch(r"\d+[-+](\d+)", expression):
                assert 20 <= int(found[1]) <= 99
    assert set(lengths) == {2, 3}


@pytest.mark.parametrize("steps", range(1, MAX_STEPS + 1))
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_stories_of_every_length(family: str, steps: int) -> None:
    for problem in problems(30, families=[family], steps=(steps, steps)):
        assert len(calls(problem)) == steps
        assert "{" not in problem.question + problem.answer
        assert problem.question.endswith("?")
        assert "  " not in problem.question


def regex(pattern: str) -> str:
    """Regular expression for a pattern's sentences, alone or after an "and"."""
    start = r"(?:\w+|(?<=and)|(?<=then)) " if pattern.startswith("{who} ") else ""
    text = re.escape(pattern.removeprefix("{who} ").removesuffix(".").removesuffix("?"))
    text = re.sub(r"\\\[(.*?)\\\]", lambda found: f"(?:{found[1].replace(chr(92) + '|', '|')})", text)
    return start + re.sub(r"\\{\w+\\}", r"\\w+", text) + "(?:[.?,]| and| then)"


def test_every_operation_and_template_occurs() -> None:
    operators = set()
    for name, family in FAMILIES.items():
        told = problems(600, families=[name])
        operators |= set(re.findall(r"\+|-|\*|//", " ".join(problem.calculation for problem in told)))
        text = "\n".join(problem.question for problem in told)
        patterns = [
            *family.openings,
            *family.questions,
            *family.remaining,
            *(step.story for step in (*family.starts, *family.steps)),
        ]
        for pattern in filter(None, patterns):
            assert re.search(regex(pattern), text, re.IGNORECASE), pattern
    assert operators == {"+", "-", "*", "//"}


def test_persons_named_before_become_pronouns_or_are_left_out() -> None:
    """The pronoun is the person's, is unambiguous and comes after the name; pronouns and omissions both occur."""
    found: Counter[str] = Counter()
    for problem in problems(2_000):
        names = re.findall(rf"\b(?:{'|'.join(PRONOUNS)})\b", problem.question)
        for pronoun in re.finditer(r"\b[Hh]e\b|\b[Ss]he\b", problem.question):
            assert {PRONOUNS[name] for name in names} == {pronoun[0].lower()}
            assert len(set(names)) == 1
            assert problem.question.index(names[0]) < pronoun.start()
            found[pronoun[0]] += 1
        asked = re.findall(r"[A-Z]\w+", problem.question.split(". ")[-1].partition(" ")[2])
        assert set(asked) <= set(re.findall(r"\w+", problem.question.rpartition(". ")[0]))
    assert min(found[kind] for kind in ("he", "He", "she", "She")) > 100, found


def test_sentences_are_joined_once_and_the_subject_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmchat.demo.tasks.arithmetic.JOINED_SHARES", (1.0, 1.0))
    monkeypatch.setattr("lmchat.demo.tasks.arithmetic.PRONOUN_SHARE", 1.0)
    links, others = set(), set()
    for seed in range(30):
        draft = _Draft(FAMILIES["savings"], random.Random(seed), "dollars", ["Zoe", "Max"], [9])
        draft.tell("{who} has ${a}.", a=9)
        draft.tell("{who} spends ${n}.", n=4)
        draft.tell("{who} finds ${n}.", n=2)
        draft.tell("A ticket costs ${n}.", n=3)
        draft.ask("How much does {who} have?")
        first, *rest = draft.story
        assert rest[1:] == ["How much does she have?"]
        links.add(first.removeprefix("Zoe has $9").removesuffix("spends $4."))
        others.add(rest[0].removeprefix("She finds $2").removesuffix("a ticket costs $3."))
    assert links == {" and ", " and then ", ", then "}
    assert others == {", and ", " and "}


def test_questions_for_the_rest_follow_subtractions() -> None:
    left = 0
    for problem in problems(4_000):
        if re.search(r"\bleft\b|\bstill\b", problem.question.split(". ")[-1]) and "to read" not in problem.question:
            taken_away = {"-", "//"} & set(re.findall(r"-|//", problem.calculation))
            assert taken_away or any(word in problem.question for word in ("pages", "miles", "meters")), problem
            left += bool(taken_away)
    assert left > 200


def test_problems_depend_only_on_index_seed_and_split() -> None:
    assert problems(50) == problems(60)[:50]
    assert list(Arithmetic(size=50, start=10, stop=30, step=7)) == list(Arithmetic(size=50))[10:30:7]
    assert problems(50) != problems(50, seed=1)
    assert len({problem.question for problem in problems(2_000)}) > 1_950


def test_problems_are_the_same_in_another_process() -> None:
    code = (
        "from lmchat.demo.tasks import Arithmetic; print([Arithmetic().problem(index).question for index in range(20)])"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "123"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert result.stdout.strip() == str([problem.question for problem in problems(20)])


def test_names_are_unique() -> None:
    assert len(PRONOUNS) == len(HE) + len(SHE) >= 60
    assert all(first < second for names in (HE, SHE) for first, second in pairwise(names))


@pytest.mark.parametrize(
    ("bad", "complaint"),
    [
        ({"steps": (0, 2)}, r"steps=\[0, 2\]"),
        ({"steps": (3, 2)}, r"steps=\[3, 2\]"),
        ({"steps": (1, MAX_STEPS + 1)}, "steps="),
        ({"operands": (0, 5)}, "operands="),
        ({"factors": (1, 5)}, "factors="),
        ({"operands": (2, 500), "max_value": 100}, "operands="),
        ({"families": ["buss"]}, "buss.*choose from things"),
        ({"families": []}, "choose from"),
        ({"size": 0}, "size is 0"),
    ],
)
def test_mistakes_are_refused(bad: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        Arithmetic(**bad)


def test_ranges_without_a_problem_are_refused() -> None:
    """The only calculation in these ranges is 100//2, which is in one split only."""
    options: dict[str, Any] = {"operands": (100, 100), "factors": (90, 99), "max_value": 100, "families": ["bus"]}
    mine, other = ("train", "test") if in_split("100//2", "train") else ("test", "train")
    assert problems(1, split=mine, steps=(1, 1), **options)[0].calculation == "100//2"
    with pytest.raises(UserError, match=f"no {other} problem.*widen the ranges"):
        problems(1, split=other, steps=(1, 1), **options)
