from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from lmchat.checkpoint.rng import capture_rng, restore_rng


def draw() -> list[float]:
    # A single normal draw caches a second one in NumPy's and Python's generators.
    numbers = [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn()]  # noqa: NPY002
    numbers += [torch.rand(()).item(), torch.randn(3).sum().item()]
    if torch.cuda.is_available():
        numbers.append(torch.rand((), device="cuda").item())
    return numbers


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_restoring_repeats_the_draws_on_a_gpu(tmp_path: Path) -> None:
    torch.rand((), device="cuda")
    test_restoring_repeats_the_draws(tmp_path)


def test_restoring_repeats_the_draws(tmp_path: Path) -> None:
    draw()
    torch.save(capture_rng(), tmp_path / "rng.pt")
    expected = [draw() for _ in range(2000)]
    assert expected[0] != draw()
    restore_rng(torch.load(tmp_path / "rng.pt", weights_only=True))
    assert [draw() for _ in range(2000)] == expected
