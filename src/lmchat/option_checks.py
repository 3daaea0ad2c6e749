"""Range checks of numeric options."""

from __future__ import annotations

import math

from lmchat.types import UserError

MAX_COUNT = 2**40
"""Limit for numbers of tokens, rows, steps or questions: more than any run has, and sizes in bytes fit into 64 bits."""


def check_range(group: str, max: float = math.inf, /, **numbers: float | None) -> None:
    """Raises UserError unless the options ``--group.name`` are finite numbers from 0 to ``max``, or None."""
    for name, value in numbers.items():
        if value is not None and (not 0 <= value <= max or math.isinf(value)):
            span = "from 0" if math.isinf(max) else f"from 0 to {max:g}"
            raise UserError(f"--{group}.{name} is {value}; it must be a number {span}")


def check_count(group: str | None, min: int, max: int = MAX_COUNT, /, **numbers: int | None) -> None:
    """Raises UserError unless the options ``--group.name`` are from ``min`` to ``max``, or None.

    An empty ``group`` stands for options without one, ``--name``; None for arguments of a function, ``name``.
    """
    for name, value in numbers.items():
        option = name if group is None else f"--{group}.{name}" if group else f"--{name}"
        if value is not None and value < min:
            raise UserError(f"{option} is {value}; it must be at least {min}")
        if value is not None and value > max:
            raise UserError(f"{option} is {value}; it must be at most {max}")
