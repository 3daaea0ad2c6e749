"""Files of evaluation results: JSON beside a checkpoint, one entry per task."""

from pathlib import Path
from typing import Any

from lmchat.files import json_object
from lmchat.types import user_errors

Result = dict[str, Any]
"""Result of a task: ``accuracy`` and other values, or ``error``, and the settings it depends on."""


def results_file(directory: Path, step: int) -> Path:
    """Path of a checkpoint's results file."""
    return directory / f"eval_{step:06d}.json"


def read_results(path: Path) -> dict[str, Result]:
    """Results by task; none if there is no such file.

    Raises:
        UserError: the file is not a results file.
    """
    if not path.exists():
        return {}
    with user_errors(f"{path} is not a results file", "move it away", ValueError):
        results = json_object(path.read_bytes())
        if not all(map(_is_result, results.values())):
            raise ValueError("it has something else than results")
    return results


def _is_result(result: Any) -> bool:
    if not isinstance(result, dict) or not isinstance(interval := result.get("interval_95") or [0, 0], list):
        return False
    numbers = (result.get("accuracy", 0), result.get("centered", 0), *interval)
    return len(interval) == 2 and all(isinstance(number, int | float | None) for number in numbers)
