"""Schedules compared with the reference implementation's values at every step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmchat.schedules import (
    linear_decay,
    linear_warmdown,
    muon_momentum,
    sft_lr_multiplier,
)


@pytest.fixture(scope="module")
def recorded(fixtures: Path) -> dict[str, np.ndarray]:
    with np.load(fixtures / "schedules.npz") as arrays:
        return dict(arrays)


def test_pretraining(recorded: dict[str, np.ndarray]) -> None:
    steps = range(1001)
    for name, values in {
        "lrm": [linear_warmdown(step, 1000) for step in steps],
        "momentum": [muon_momentum(step) for step in steps],
        "wd": [0.2 * linear_decay(step, 1000) for step in steps],
    }.items():
        np.testing.assert_allclose(values, recorded[f"seed_N1000__{name}"], rtol=1e-14, atol=1e-16, err_msg=name)


def test_fine_tuning(recorded: dict[str, np.ndarray]) -> None:
    values = [sft_lr_multiplier(progress) for progress in recorded["sft_seed__progress"]]
    np.testing.assert_allclose(values, recorded["sft_seed__lrm"], rtol=0, atol=1e-15)
    momentum = recorded["sft_seed__momentum"]
    np.testing.assert_allclose([muon_momentum(step) for step in range(len(momentum))], momentum, rtol=1e-14)


def test_reinforcement_learning(recorded: dict[str, np.ndarray]) -> None:
    np.testing.assert_allclose([linear_decay(step, 467) for step in range(467)], recorded["rl_seed__lrm"])


def test_warmup_constant_and_warmdown_at_their_boundaries() -> None:
    values = [linear_warmdown(step, 100, 0.1, 0.4, 0.25) for step in range(101)]
    assert values[0] == pytest.approx(0.1)
    assert values[9:61] == [1.0] * 52
    assert values[61] == pytest.approx(1 - 0.75 / 40)
    assert values[100] == pytest.approx(0.25)


@given(
    st.integers(1, 5000),
    st.floats(0, 0.5),
    st.floats(0, 0.5),
    st.floats(0, 1),
)
def test_the_last_step_taken_is_above_the_final_value(
    steps: int, warmup_ratio: float, warmdown_ratio: float, final: float
) -> None:
    values = [linear_warmdown(step, steps, warmup_ratio, warmdown_ratio, final) for step in range(steps)]
    assert all(0 < value <= 1 for value in values)
    assert values[-1] >= final
    peak = values.index(max(values))
    assert values[:peak] == sorted(values[:peak])
    assert values[peak:] == sorted(values[peak:], reverse=True)
