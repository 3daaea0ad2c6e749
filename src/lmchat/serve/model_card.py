"""Which model a server has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ModelCard:
    """Which model answers.

    Attributes:
        name: its id in the API.
        created: when its checkpoint was written, in seconds since 1970.
        details: what the page shows about it: stage, tag, step, parameters.
    """

    name: str
    created: int
    details: dict[str, Any]
