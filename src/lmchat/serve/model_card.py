"""Description of a server's model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ModelCard:
    """Description of the model.

    Attributes:
        name: id in the API.
        created: time of the checkpoint, in seconds since 1970.
        details: details shown on the page: stage, tag, step, parameters.
    """

    name: str
    created: int
    details: dict[str, Any]
