"""pass@k against all choices of k samples, one by one."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch

from lmchat.evaluation.pass_at_k import PassAtK, pass_at_k

NUM_SAMPLES = 6


@pytest.mark.parametrize("k", range(1, NUM_SAMPLES + 1))
def test_pass_at_k_equals_brute_force_over_choices(k: int) -> None:
    expected = []
    for right in range(NUM_SAMPLES + 1):
        choices = list(combinations([True] * right + [False] * (NUM_SAMPLES - right), k))
        expected.append(sum(map(any, choices)) / len(choices))
    estimate = pass_at_k(torch.arange(NUM_SAMPLES + 1), NUM_SAMPLES, k)
    torch.testing.assert_close(estimate, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-15)


def test_batches_and_ranks_are_weighted_by_their_questions() -> None:
    right = torch.tensor([0, 1, 2, 3, 6])
    first, second = PassAtK(2), PassAtK(2)
    first.update(right[:1], NUM_SAMPLES)
    first.update(right[1:4], NUM_SAMPLES)
    second.update(right[4:], NUM_SAMPLES)
    first.merge_state(second)
    assert float(first.compute()) == pytest.approx(float(pass_at_k(right, NUM_SAMPLES, 2).mean()), rel=1e-15)


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_no_questions_give_no_metric() -> None:
    assert math.isnan(PassAtK(1).compute())
