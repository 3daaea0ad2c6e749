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

MAX_CHARACTERS = 1000
MAX_DEPTH = 50
"""Limit for nested parentheses and consecutive signs."""
MAX_DIGITS = 100
"""Limit for the digits of literals and intermediate results."""

_TOO_LARGE = 10**MAX_DIGITS

Number = int | float

_NUMBER = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+"
_TOKEN = re.compile(rf" *(?:({_NUMBER})|(//|[-+*/()]))", re.ASCII)
_STRING = r"'[ -&(-\[\]-~]*'|\"[ !#-\[\]-~]*\""
_COUNT = re.compile(rf" *({_STRING}) *\.count\( *({_STRING}) *\) *")

_SUM: dict[str, Callable[[Number, Number], Number]] = {"+": operator.add, "-": operator.sub}
_PRODUCT: dict[str, Callable[[Number, Number], Number]] = {
    "*": operator.mul,
    "/": operator.truediv,
    "//": operator.floordiv,
}


class _Rejected(Exception):
    """The expression is outside the grammar or its limits."""


def calculate(expression: str) -> str | None:
    """The value of `expression` as Python would print it; None if it has no value. Never raises."""
    if len(expression) > MAX_CHARACTERS:
        return None
    if call := _COUNT.fullmatch(expression):
        text, part = (literal[1:-1] for literal in call.groups())
        return str(text.count(part))
    try:
        return str(_Parser(_tokenize(expression)).parse())
    except (_Rejected, ZeroDivisionError):
        return None


def _tokenize(expression: str) -> list[Number | str]:
    """Splits an expression into numbers, and operators and parentheses as strings."""
    expression = expression.rstrip(" ")
    tokens: list[Number | str] = []
    position = 0
    while position < len(expression):
        match = _TOKEN.match(expression, position)
        if match is None:
            raise _Rejected
        number, symbol = match.groups()
        tokens.append(symbol if number is None else _literal(number))
        position = match.end()
    return tokens


def _literal(text: str) -> Number:
    text = text.replace(",", "")
    if len(text) > MAX_DIGITS:
        raise _Rejected
    if "." in text:
        return float(text)
    if text.startswith("0") and text.strip("0"):
        raise _Rejected  # 007 is not a number in Python
    return int(text)


def _bounded(value: Number) -> Number:
    in_bounds = abs(value) < _TOO_LARGE if isinstance(value, int) else math.isfinite(value)
    if not in_bounds:
        raise _Rejected
    return value


class _Parser:
    """Evaluates a list of tokens; has one method per level of precedence."""

    def __init__(self, tokens: list[Number | str]) -> None:
        self.tokens = tokens
        self.position = 0

    def parse(self) -> Number:
        value = self._sum(depth=0)
        if self._next() is not None:
            raise _Rejected
        return value

    def _next(self) -> Number | str | None:
        return self.tokens[self.position] if self.position < len(self.tokens) else None

    def _sum(self, depth: int) -> Number:
        return self._left_associative(_SUM, self._product, depth)

    def _product(self, depth: int) -> Number:
        return self._left_associative(_PRODUCT, self._signed, depth)

    def _left_associative(
        self, operators: dict[str, Callable[[Number, Number], Number]], operand: Callable[[int], Number], depth: int
    ) -> Number:
        value = operand(depth)
        while isinstance(symbol := self._next(), str) and symbol in operators:
            self.position += 1
            value = _bounded(operators[symbol](value, operand(depth)))
        return value

    def _signed(self, depth: int) -> Number:
        if depth > MAX_DEPTH:
            raise _Rejected
        token = self._next()
        self.position += 1
        match token:
            case int() | float():
                return token
            case "-":
                return -self._signed(depth + 1)
            case "+":
                return +self._signed(depth + 1)
            case "(":
                value = self._sum(depth + 1)
                if self._next() != ")":
                    raise _Rejected
                self.position += 1
                return value
        raise _Rejected
