"""AdamW's update compared with recorded steps of the reference, a float64 recurrence and torch's optimizer."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from lmchat.optim.muon_adamw import adamw_update


class Moments:
    """A tensor and its state, updated by the function under test."""

    def __init__(self, param: Tensor) -> None:
        self.param = param.clone()
        self.exp_avg, self.exp_avg_sq = torch.zeros_like(param), torch.zeros_like(param)
        self.step = torch.zeros(())

    def update(self, grad: Tensor, *, lr: float, betas: tuple[float, float], weight_decay: float = 0.0) -> None:
        state = {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq, "step": self.step}
        settings = {"lr": lr, "betas": betas, "eps": 1e-10, "weight_decay": weight_decay}
        adamw_update([self.param], [grad], [state], settings)


def check_against_reference(arrays: dict[str, NDArray], lrs: list[float], betas: tuple, weight_decay: float) -> None:
    moments = Moments(torch.from_numpy(arrays["p0"]))
    for step, lr in enumerate(lrs):
        moments.update(torch.from_numpy(arrays["grads"][step]), lr=lr, betas=betas, weight_decay=weight_decay)
        np.testing.assert_allclose(moments.param, arrays["p"][step], rtol=0, atol=1e-6)
        np.testing.assert_allclose(moments.exp_avg, arrays["m"][step], rtol=1e-5, atol=1e-9)
        np.testing.assert_allclose(moments.exp_avg_sq, arrays["v"][step], rtol=1e-5, atol=1e-12)
    assert moments.step == len(lrs)


@pytest.mark.parametrize("case", ["a_embed", "c_x0"])
def test_reference_steps(case: str, fixtures: Path) -> None:
    archive = np.load(fixtures / "adamw.npz")
    arrays = {key: archive[f"{case}__{key}"] for key in ("p0", "grads", "p", "m", "v")}
    check_against_reference(arrays, archive[f"{case}__lr"].tolist(), tuple(archive[f"{case}__betas"]), 0.0)


def test_every_measured_case(oracles: Path) -> None:
    archive = np.load(oracles / "c03_adamw.npz")
    for case, settings in json.loads((oracles / "c03_adamw.json").read_text()).items():
        arrays = {key: archive[f"{case}__{key}"] for key in ("p0", "grads", "p", "m", "v")}
        check_against_reference(arrays, settings["lr"], tuple(settings["betas"]), settings["wd"])


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_float64_recurrence(weight_decay: float) -> None:
    generator = torch.Generator().manual_seed(0)
    moments = Moments(torch.randn(7, 3, dtype=torch.float64, generator=generator))
    p, m, v = moments.param.numpy().copy(), np.zeros((7, 3)), np.zeros((7, 3))
    for t in range(1, 6):
        grad = torch.randn(7, 3, dtype=torch.float64, generator=generator) * 1e-3
        lr, g = 0.3 / t, grad.numpy()
        moments.update(grad, lr=lr, betas=(0.96, 0.95), weight_decay=weight_decay)
        p = p * (1 - lr * weight_decay)
        m, v = 0.96 * m + 0.04 * g, 0.95 * v + 0.05 * g * g
        p = p - lr / (1 - 0.96**t) * m / (np.sqrt(v / (1 - 0.95**t)) + 1e-10)
        np.testing.assert_allclose(moments.param, p, rtol=0, atol=1e-13)


def test_zero_gradients_leave_parameters_unchanged() -> None:
    moments = Moments(torch.ones(4))
    for _ in range(3):
        moments.update(torch.zeros(4), lr=0.3, betas=(0.8, 0.95))
    torch.testing.assert_close(moments.param, torch.ones(4), rtol=0, atol=0)


def test_updating_rows_separately_gives_the_same_result() -> None:
    generator = torch.Generator().manual_seed(0)
    whole = Moments(torch.randn(9, 5, generator=generator))
    parts = [Moments(rows) for rows in whole.param.split(4)]
    for _ in range(3):
        grad = torch.randn(9, 5, generator=generator)
        whole.update(grad, lr=0.1, betas=(0.8, 0.95), weight_decay=0.1)
        for part, rows in zip(parts, grad.split(4), strict=True):
            part.update(rows, lr=0.1, betas=(0.8, 0.95), weight_decay=0.1)
    torch.testing.assert_close(torch.cat([part.param for part in parts]), whole.param, rtol=0, atol=1e-7)


def test_agrees_with_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    param = torch.nn.Parameter(torch.randn(6, 4, generator=generator))
    moments = Moments(param.detach())
    optimizer = torch.optim.AdamW([param], lr=0.02, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.1, foreach=False)
    for _ in range(4):
        param.grad = torch.randn(6, 4, generator=generator)
        moments.update(param.grad, lr=0.02, betas=(0.8, 0.95), weight_decay=0.1)
        optimizer.step()
    torch.testing.assert_close(moments.param, param.detach(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("transposed", ["param", "grad"])
def test_the_layout_in_memory_does_not_matter(transposed: str) -> None:
    generator = torch.Generator().manual_seed(0)
    param, grad = torch.randn(6, 4, generator=generator), torch.randn(6, 4, generator=generator)
    plain = Moments(param)
    plain.update(grad, lr=0.1, betas=(0.8, 0.95))
    other = Moments(param)
    if transposed == "param":
        other.param = param.T.contiguous().T
        other.exp_avg, other.exp_avg_sq = torch.zeros_like(other.param), torch.zeros_like(other.param)
    else:
        grad = grad.T.contiguous().T
    other.update(grad, lr=0.1, betas=(0.8, 0.95))
    torch.testing.assert_close(other.param, plain.param, rtol=0, atol=1e-7)
