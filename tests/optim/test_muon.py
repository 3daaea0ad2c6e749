"""Muon's update compared with recorded steps of the reference, intermediate values included, and its properties."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from lmchat.optim.muon_adamw import muon_update, polar_express, reduce_variance, second_moment_shape

SHAPES = ["64x256", "256x64"]


class Stack:
    """A stack of matrices and its state, updated by the function under test."""

    def __init__(self, params: Tensor) -> None:
        self.params, self.buffers = params.clone(), torch.zeros_like(params)
        self.second_moments = params.new_zeros(len(params), *second_moment_shape(*params.shape[1:]))

    def update(self, grads: Tensor, **settings: Any) -> None:
        muon_update(self.params, grads, self.buffers, self.second_moments, **settings)


def random_stack(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def assert_params_match(actual: NDArray, expected: NDArray, decay: float) -> None:
    """Within 1e-6, except entries whose update is 0 up to rounding: its sign decides if they decay, by ``decay``."""
    difference = np.abs(actual - expected)
    assert np.sort(difference, axis=None)[-4] < 1e-6
    assert (difference < 1e-6 + 1.01 * decay * np.abs(expected)).all()


def fixture_settings(archive: Any, step: int) -> dict[str, float]:
    return {key: float(archive[key][step]) for key in ("lr", "momentum", "weight_decay")}


def entries_of(tensor: Tensor, entries: NDArray) -> NDArray:
    return tensor.flatten().double().numpy()[entries]


@pytest.mark.parametrize("shape", SHAPES)
def test_reference_steps_with_all_intermediates(shape: str, fixtures: Path) -> None:
    archive = np.load(fixtures / f"muon_{shape}.npz")
    entries = archive["entries"]
    stack = Stack(torch.from_numpy(archive["p0"])[None])
    momentum = archive["momentum"][0]
    nesterov = torch.from_numpy(archive["grads"][0])[None] * (1 - momentum) * (1 + momentum)
    np.testing.assert_allclose(entries_of(nesterov, entries), archive["nesterov_step1"], rtol=1e-5)
    polar = polar_express(nesterov)
    # The reference's own distance from float64 is 2e-6 here.
    np.testing.assert_allclose(entries_of(polar, entries), archive["polar_step1"], rtol=0, atol=5e-6)
    for step, grad in enumerate(archive["grads"]):
        settings = fixture_settings(archive, step)
        stack.update(torch.from_numpy(grad)[None], **settings)
        decay = settings["lr"] * settings["weight_decay"]
        assert_params_match(entries_of(stack.params, entries), archive["p"][step], decay)
        np.testing.assert_allclose(entries_of(stack.buffers, entries), archive["buf"][step], rtol=1e-5, atol=1e-9)
        np.testing.assert_allclose(stack.second_moments[0], archive["v"][step], rtol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_bf16_orthogonalisation_is_nearer_to_fp32_than_the_reference(shape: str, fixtures: Path) -> None:
    archive = np.load(fixtures / f"muon_{shape}.npz")
    stack = Stack(torch.from_numpy(archive["p0"])[None])
    for step, grad in enumerate(archive["grads"]):
        settings = fixture_settings(archive, step)
        stack.update(torch.from_numpy(grad)[None], **settings, polar_dtype=torch.bfloat16)
        difference = np.abs(entries_of(stack.params, archive["entries"]) - archive["p"][step])
        assert 0 < difference.mean() < 0.5 * archive["bf16_mean"][step]
        assert difference.max() < archive["bf16_max"][step]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_measured_case(dtype: torch.dtype, oracles: Path) -> None:
    archive = np.load(oracles / "c04_muon.npz")
    settings = json.loads((oracles / "c04_muon.json").read_text())
    for case in [key for key in settings if key.startswith("s")]:
        arrays = {key.removeprefix(case + "__"): archive[key] for key in archive if key.startswith(case + "__")}
        steps = zip(*(settings[case][key] for key in ("base_lr", "momentum", "weight_decay")), strict=True)
        stack = Stack(torch.from_numpy(arrays["p0"]).to(dtype))
        for step, (lr, momentum, weight_decay) in enumerate(steps):
            grads = torch.from_numpy(arrays["grads"][step]).to(dtype)
            stack.update(grads, lr=lr, momentum=momentum, weight_decay=weight_decay)
            assert_params_match(stack.params.numpy(), arrays["p_fp32"][step], lr * weight_decay)
            buffers = arrays["buf"][step]
            np.testing.assert_allclose(stack.buffers, buffers, rtol=0, atol=1e-6 * np.abs(buffers).max())
            np.testing.assert_allclose(stack.second_moments, arrays["v_fp32"][step], rtol=1e-4)
        if dtype == torch.float64:
            np.testing.assert_allclose(stack.params, arrays["p_fp64_last"], rtol=0, atol=1e-12)
        polar = polar_express(torch.from_numpy(arrays["nesterov_g_step1"]).to(dtype))
        np.testing.assert_allclose(polar, arrays["polar_step1_fp32"], rtol=0, atol=5e-6)


@pytest.mark.parametrize("shape", [(3, 48, 16), (3, 16, 48), (3, 32, 32), (2, 2, 32)])
def test_polar_express_approximates_the_polar_factor(shape: tuple[int, int, int]) -> None:
    matrices = random_stack(*shape, dtype=torch.float64)
    left, values, right = torch.linalg.svd(matrices, full_matrices=False)
    orthogonal = polar_express(matrices)
    # Same singular vectors, singular values near 1.
    core = left.mT @ orthogonal @ right.mT
    diagonal = core.diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(core, torch.diag_embed(diagonal), rtol=0, atol=1e-9)
    well_above_zero = values > 5e-3 * torch.linalg.vector_norm(values, dim=-1, keepdim=True)
    assert ((diagonal[well_above_zero] > 0.85) & (diagonal[well_above_zero] < 1.15)).all()


def test_polar_express_ignores_the_scale() -> None:
    matrices = random_stack(2, 8, 24, dtype=torch.float64)
    torch.testing.assert_close(polar_express(matrices * 1e3), polar_express(matrices), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 12, 5), (2, 5, 12), (2, 6, 6)])
def test_reduce_variance_keeps_the_norm_and_evens_out_the_rows(shape: tuple[int, int, int]) -> None:
    update = random_stack(*shape, dtype=torch.float64) * torch.logspace(-2, 2, shape[1], dtype=torch.float64)[:, None]
    axis = -1 if shape[1] >= shape[2] else -2
    second_moment = update.new_zeros(2, *second_moment_shape(*shape[1:]))
    reduced = reduce_variance(update, second_moment, beta2=0.95)
    torch.testing.assert_close(reduced.norm(dim=(-2, -1)), update.norm(dim=(-2, -1)))
    torch.testing.assert_close(second_moment, 0.05 * update.square().mean(axis, keepdim=True))
    # From a zero state one step divides every row by its own root mean square, up to one common factor.
    rms = reduced.square().mean(axis)
    torch.testing.assert_close(rms, rms[:, :1].expand_as(rms))


def test_weight_decay_only_where_signs_agree() -> None:
    params, grads = random_stack(2, 6, 9, seed=1), random_stack(2, 6, 9, seed=2)
    settings = {"lr": 0.1, "momentum": 0.9}
    plain, decayed = Stack(params), Stack(params)
    plain.update(grads, weight_decay=0.0, **settings)
    decayed.update(grads, weight_decay=0.5, **settings)
    moved = params - plain.params
    expected = torch.where(moved * params >= 0, 0.1 * 0.5 * params, torch.zeros(()))
    torch.testing.assert_close(plain.params - decayed.params, expected, rtol=1e-4, atol=1e-6)
    assert 0.2 < (expected != 0).float().mean() < 0.8


@pytest.mark.parametrize(("rows", "cols", "factor"), [(32, 8, 2.0), (8, 8, 1.0), (8, 32, 1.0)])
def test_learning_rate_grows_with_the_root_of_the_aspect(rows: int, cols: int, factor: float) -> None:
    stack = Stack(torch.zeros(1, rows, cols))
    grads = random_stack(1, rows, cols)
    stack.update(grads, lr=0.1, momentum=0.9, weight_decay=0.1)
    direction = polar_express(grads * 0.19)
    torch.testing.assert_close(stack.params.norm(), 0.1 * factor * direction.norm(), rtol=1e-4, atol=0)


def test_zero_gradients_decay_but_stay_finite() -> None:
    params = random_stack(2, 4, 8)
    stack = Stack(params)
    stack.update(torch.zeros_like(params), lr=0.1, momentum=0.95, weight_decay=0.2)
    torch.testing.assert_close(stack.params, params * (1 - 0.1 * 0.2))


@pytest.mark.parametrize("shape", [(16, 48), (48, 16), (24, 24)])
def test_the_update_of_a_matrix_does_not_depend_on_its_stack(shape: tuple[int, int]) -> None:
    params, settings = random_stack(5, *shape, dtype=torch.float64), {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.2}
    whole, parts = Stack(params), [Stack(params[:2]), Stack(params[2:])]
    for seed in range(3):
        grads = random_stack(5, *shape, dtype=torch.float64, seed=seed)
        whole.update(grads, **settings)
        parts[0].update(grads[:2], **settings)
        parts[1].update(grads[2:], **settings)
    torch.testing.assert_close(torch.cat([part.params for part in parts]), whole.params, rtol=0, atol=1e-13)
