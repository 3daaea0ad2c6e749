"""Range checks of numbers: of options, and of data positions in checkpoints."""

import math
from collections.abc import Mapping
from typing import Any

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


def damaged_position(reason: str) -> UserError:
    """The error for a data position that no run has saved."""
    return UserError(f"the data position in the checkpoint is damaged ({reason}); use an older checkpoint")


def count_in(state: Any, name: str, maximum: int) -> int:
    """The integer ``state[name]``.

    Raises:
        UserError: it is missing, no integer, or not between 0 and ``maximum``.
    """
    value = state.get(name) if isinstance(state, Mapping) else None
    if type(value) is not int or not 0 <= value <= maximum:
        raise damaged_position(f"{name} is {str(value)[:40]}, not an integer from 0 to {maximum}")
    return value
