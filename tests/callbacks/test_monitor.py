"""Unit tests of the monitor; test_plan_callbacks tests its records in real runs."""

from __future__ import annotations

import json
import math
import warnings

import pytest
import torch

from lmchat.callbacks.monitor import EMA_DECAY, LossEMA, Monitor


def losses(number: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return list(1 + 10 * torch.rand(number, generator=generator))


@pytest.mark.parametrize("resumed_after", [0, 1, 17, 49])
def test_the_moving_average_continues_bit_for_bit_after_a_resume(resumed_after: int) -> None:
    through, resumed = LossEMA(), LossEMA()
    for number, loss in enumerate(losses(50)):
        if number == resumed_after:
            state = json.loads(json.dumps(resumed.state()))  # as plain numbers
            resumed = LossEMA()
            resumed.load(state)
        through.update(loss)
        resumed.update(loss)
        assert torch.equal(through.value(), resumed.value()), number


def test_the_moving_average_is_the_weighted_mean() -> None:
    ema, given = LossEMA(), losses(20)
    for loss in given:
        ema.update(loss)
    weights = [EMA_DECAY ** (19 - number) for number in range(20)]
    mean = sum(weight * float(loss) for weight, loss in zip(weights, given, strict=True)) / sum(weights)
    assert math.isclose(float(ema.value()), mean, rel_tol=1e-6)


def test_non_finite_losses_are_ignored() -> None:
    with_nan, without = LossEMA(), LossEMA()
    for loss in losses(5):
        for bad in (math.nan, math.inf):
            with_nan.update(torch.tensor(bad))
        with_nan.update(loss)
        without.update(loss)
    assert torch.equal(with_nan.value(), without.value())


def test_utilization_is_never_above_one() -> None:
    monitor = Monitor()
    monitor._peak = 100e12
    assert monitor._mfu(57e12) == 0.57
    with pytest.warns(UserWarning, match="MFU is not logged: this device reaches 168 TFLOP/s, more than the 100"):
        assert monitor._mfu(168e12) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert monitor._mfu(57e12) is None  # The assumed peak is too low.
