"""The length of a run."""

from __future__ import annotations

import pytest

from lmchat.run_plan import horizon
from lmchat.scaling import make_plan
from lmchat.types import UserError

LAWS = make_plan(depth=2, vocab_size=256, sequence_len=32, max_steps=7)


@pytest.mark.parametrize(
    ("max_steps", "data_steps", "laws", "steps"),
    [(5, None, None, 5), (None, 9, None, 9), (5, 9, None, 5), (9, 9, None, 9), (None, None, LAWS, 7)],
)
def test_horizon(max_steps: int | None, data_steps: int | None, laws: object, steps: int) -> None:
    assert horizon(max_steps, data_steps, laws) == steps  # type: ignore[arg-type]


def test_too_little_data_is_refused() -> None:
    with pytest.raises(UserError, match="max_steps is 100, and the training data lasts 9"):
        horizon(100, 9, None)
    with pytest.raises(UserError, match="not set"):
        horizon(None, None, None)
