"""Checks of data positions that come from a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lmchat.types import UserError


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
