"""The calculator for tool calls: arithmetic, and counting letters in a string literal.

A recursive-descent parser evaluates the expression; it cannot execute code. The grammar:

    expression := sum | count
    sum        := product (("+" | "-") product)*
    product    := signed (("*" | "/" | "//") signed)*
    signed     := ("+" | "-")* primary
    primary    := number | "(" sum ")"
    count      := string ".count(" string ")"

Numbers may have commas between thousands ("1,234.5"); strings are printable ASCII in single or double quotes, without
escapes. There is no power operator, so a result has at most as many digits as its expression has characters, and the
limits below bound time and memory.

Results are formatted as in Python: "16.0" for 48/3. Differences from nanochat's calculator, which strips commas and
calls Python's eval: a comma is only allowed between thousands and in strings; strings may have any printable character
and any word (nanochat refuses 'profile', since it contains "file"); empty parentheses and infinite results have no
value.
"""

import math
import operator
import re
from collections.abc import Callable
from typing import Any

MAX_CHARACTERS = 1000
MAX_DEPTH = 50
"""Limit for nested parentheses and consecutive signs."""
MAX_DIGITS = 100
"""Limit for the digits of literals and intermediate results."""

_NUMBER = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+"
_TOKEN = re.compile(rf"{_NUMBER}|//|[-+*/()]", re.ASCII)
_STRING = r"'[ -&(-\[\]-~]*'|\"[ !#-\[\]-~]*\""
_COUNT = re.compile(rf" *({_STRING}) *\.count\( *({_STRING}) *\) *")

_OPERATORS: tuple[dict[str, Callable[[Any, Any], Any]], ...] = (
    {"+": operator.add, "-": operator.sub},
    {"*": operator.mul, "/": operator.truediv, "//": operator.floordiv},
)
"""Left-associative operators by level of precedence."""
_SIGNS: dict[str, Callable[[Any], Any]] = {"+": operator.pos, "-": operator.neg}


def calculate(expression: str) -> str | None:
    """The value of `expression` as Python would print it; None if it has no value. Never raises."""
    if len(expression) > MAX_CHARACTERS:
        return None
    if call := _COUNT.fullmatch(expression):
        text, part = (literal[1:-1] for literal in call.groups())
        return str(text.count(part))
    tokens = _TOKEN.findall(expression)
    if "".join(tokens) != expression.replace(" ", ""):
        return None
    rest = ["", *reversed(tokens)]
    try:
        value = _value(rest, depth=0)
    except (ValueError, ZeroDivisionError):
        return None
    return str(value) if rest == [""] else None


def _value(rest: list[str], depth: int, level: int = 0) -> Any:
    """Value of a sum, of a product at level 1; removes its tokens, the last ones of ``rest``. May raise ValueError."""
    if level == len(_OPERATORS):
        return _signed(rest, depth)
    value = _value(rest, depth, level + 1)
    while rest[-1] in _OPERATORS[level]:
        value = _OPERATORS[level][rest.pop()](value, _value(rest, depth, level + 1))
        if not (abs(value) < 10**MAX_DIGITS if isinstance(value, int) else math.isfinite(value)):
            raise ValueError("too large")
    return value


def _signed(rest: list[str], depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise ValueError("too deep")
    token = rest.pop()
    if token in _SIGNS:
        return _SIGNS[token](_signed(rest, depth + 1))
    if token == "(":
        value = _value(rest, depth + 1)
        if rest.pop() != ")":
            raise ValueError("a parenthesis is not closed")
        return value
    digits = token.replace(",", "")
    if len(digits) > MAX_DIGITS or (digits.isdecimal() and digits[0] == "0" and digits.strip("0")):
        raise ValueError("too long, or like 007 not a number in Python")
    return float(digits) if "." in digits else int(digits)
