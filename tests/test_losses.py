"""The chunked loss compared with the plain one: values, gradients, masks, weights and memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lmchat import losses as head
from lmchat.losses import linear_cross_entropy, softcap
from lmchat.types import IGNORE_INDEX


def plain(
    hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, reduction: str, weights: Tensor | None
) -> Tensor:
    """The loss by its definition, with all logits in memory."""
    logits = 15 * torch.tanh((hidden @ weight.T)[..., :vocab_size] / 15)
    losses = F.cross_entropy(
        logits.flatten(0, -2), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="none"
    ).view(targets.shape)
    if weights is not None:
        losses = losses * weights
    if reduction == "none":
        return losses
    return losses.sum() / ((targets != IGNORE_INDEX).sum() if reduction == "mean" else 1)


def problem(
    shape: tuple[int, ...], width: int, vocab_size: int, seed: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, a table with padding rows, and targets of which about a quarter are ignored."""
    generator = torch.Generator().manual_seed(seed)
    hidden = 3 * torch.randn(*shape, width, generator=generator, dtype=dtype)
    weight = torch.randn(vocab_size + 5, width, generator=generator, dtype=dtype)
    targets = torch.randint(vocab_size, shape, generator=generator)
    targets[torch.rand(shape, generator=generator) < 0.25] = IGNORE_INDEX
    targets.view(-1)[0] = vocab_size - 1
    return hidden.requires_grad_(), weight.requires_grad_(), targets


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 3),
    length=st.integers(1, 11),
    vocab_size=st.integers(2, 40),
    chunk_tokens=st.integers(1, 40),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    weighted=st.booleans(),
    seed=st.integers(0, 100),
)
def test_equals_the_plain_head(
    rows: int, length: int, vocab_size: int, chunk_tokens: int, reduction: Any, weighted: bool, seed: int
) -> None:
    hidden, weight, targets = problem((rows, length), 6, vocab_size, seed)
    weights = torch.randn(rows, length, dtype=torch.float64) if weighted else None
    expected = plain(hidden, weight, targets, vocab_size, reduction, weights)
    options: Any = {"vocab_size": vocab_size, "weights": weights, "chunk_tokens": chunk_tokens}
    token_losses = torch.full(targets.shape, torch.nan, dtype=torch.float64)
    actual = linear_cross_entropy(
        hidden,
        weight,
        targets,
        reduction=reduction,
        token_losses=token_losses if reduction == "sum" else None,
        **options,
    )
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    if reduction == "sum":
        per_token = plain(hidden, weight, targets, vocab_size, "none", weights)
        torch.testing.assert_close(token_losses, per_token, rtol=1e-10, atol=1e-10)
        assert not token_losses.requires_grad
    assert actual.requires_grad == (reduction != "none")
    if reduction != "none":
        upstream = torch.randn_like(expected)
        gradients = torch.autograd.grad(actual, (hidden, weight), upstream)
        torch.testing.assert_close(
            gradients, torch.autograd.grad(expected, (hidden, weight), upstream), rtol=1e-8, atol=1e-10
        )


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradients_are_those_of_finite_differences(reduction: Any, weighted: bool) -> None:
    hidden, weight, targets = problem((2, 3), 4, 7, 1)
    options: Any = {"reduction": reduction, "weights": torch.tensor([[2.0, -1, 0.5]] * 2) if weighted else None}

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight, targets, vocab_size=7, chunk_tokens=4, **options)

    assert torch.autograd.gradcheck(loss, (hidden, weight))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_equals_unfused(dtype: torch.dtype) -> None:
    hidden, weight, targets = problem((4, 10), 16, 100, 3, torch.float32)
    hidden = hidden.detach().to(dtype).requires_grad_()
    losses = [
        linear_cross_entropy(hidden, weight, targets, vocab_size=100, chunk_tokens=16, fused=fused)
        for fused in (False, True)
    ]
    torch.testing.assert_close(*losses)
    gradients = [torch.autograd.grad(loss, (hidden, weight)) for loss in losses]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_targets_give_zero_loss(reduction: Any) -> None:
    hidden, weight, targets = problem((2, 3), 4, 7, 1)
    loss = linear_cross_entropy(
        hidden, weight, torch.full_like(targets, IGNORE_INDEX), vocab_size=7, reduction=reduction
    ).sum()
    assert loss == 0
    if reduction != "none":
        loss.backward()
        assert not hidden.grad.any() and not weight.grad.any()


def test_padding_rows_have_zero_gradient() -> None:
    hidden, weight, targets = problem((2, 9), 4, 7, 1)
    linear_cross_entropy(hidden, weight, targets, vocab_size=7).backward()
    assert weight.grad.shape == weight.shape
    assert weight.grad[:7].any(dim=1).all() and not weight.grad[7:].any()


def test_large_logits_stay_finite() -> None:
    hidden, weight, targets = problem((4, 4), 8, 50, 2, torch.float32)
    big = (1e4 * hidden).detach().requires_grad_()
    loss = linear_cross_entropy(big, weight, targets, vocab_size=50)
    loss.backward()
    torch.testing.assert_close(loss, plain(big, weight, targets, 50, "mean", None))
    assert big.grad.isfinite().all()


def test_half_precision_input_keeps_an_fp32_loss_and_gradient() -> None:
    hidden, weight, targets = problem((4, 32), 16, 100, 3, torch.float32)
    half = (0.3 * hidden).detach().bfloat16().requires_grad_()
    small = (0.3 * weight).detach().requires_grad_()
    loss = linear_cross_entropy(half, small, targets, vocab_size=100, chunk_tokens=48)
    loss.backward()
    exact = half.detach().double().requires_grad_(), small.detach().double().requires_grad_()
    expected = plain(*exact, targets, 100, "mean", None)
    expected.backward()
    assert loss.dtype == small.grad.dtype == torch.float32 and half.grad.dtype == torch.bfloat16
    assert loss.item() == pytest.approx(expected.item(), rel=2e-3)
    for half_grad, exact_grad in ((half.grad, exact[0].grad), (small.grad, exact[1].grad)):
        assert (half_grad - exact_grad).norm() < 0.02 * exact_grad.norm()


class LargestTensor(TorchDispatchMode):
    """Number of elements of the largest tensor that any operator returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.elements = max(self.elements, out.numel())
        return out


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_full_logits_are_never_allocated(reduction: Any) -> None:
    hidden, weight, targets = problem((4, 64), 8, 300, 4, torch.float32)
    with LargestTensor() as largest:
        loss = linear_cross_entropy(hidden, weight, targets, vocab_size=300, reduction=reduction, chunk_tokens=16)
        if reduction == "mean":
            loss.backward()
    assert largest.elements <= 16 * 300 < targets.numel() * 300


def test_softcap_bounds_and_leaves_small_logits() -> None:
    logits = torch.tensor([-1e9, -0.01, 0.0, 0.01, 1e9])
    torch.testing.assert_close(softcap(logits), torch.tensor([-15.0, -0.01, 0.0, 0.01, 15.0]))


def test_without_gradients_nothing_is_saved() -> None:
    hidden, weight, targets = problem((2, 3), 4, 7, 1)
    with torch.no_grad():
        loss = linear_cross_entropy(hidden, weight, targets, vocab_size=7)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, plain(hidden, weight, targets, 7, "mean", None).detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loss_scale_is_applied_to_both_gradients_in_fp32(dtype: torch.dtype) -> None:
    """1/6 rounded to bf16 is off by 0.2 %, which must not affect only one of the two gradients."""
    gradients = []
    for scale in (1.0, 1 / 6):
        hidden, weight, targets = problem((2, 40), 8, 50, 5, torch.float32)
        hidden = hidden.detach().to(dtype).requires_grad_()
        weight = weight.detach().requires_grad_()
        (linear_cross_entropy(hidden, weight, targets, vocab_size=50) * scale).backward()
        gradients.append((hidden.grad, weight.grad))
    (hidden_grad, weight_grad), scaled = gradients
    assert scaled[0].equal((hidden_grad.float() * torch.tensor(1 / 6)).to(dtype))
    assert scaled[1].equal(weight_grad * torch.tensor(1 / 6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_compiled_variant_gives_the_same_result(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(30, 70, generator=generator).to(dtype)
    picks = torch.randint(70, (30, 1), generator=generator)
    scale = torch.rand(30, 1, generator=generator)
    expected = head._loss_and_logit_gradient(logits.clone(), picks, scale)
    actual = head._loss_and_logit_gradient(logits.clone(), picks, scale, fused=True)
    assert all(map(torch.equal, actual, expected))


def test_fused_compiles_only_elementwise_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    monkeypatch.setattr(head, "compiled", lambda function: compiled.append(function.__name__) or function)
    hidden, weight, targets = problem((2, 9), 4, 7, 1)
    values = [linear_cross_entropy(hidden, weight, targets, vocab_size=7, fused=fused) for fused in (False, True)]
    assert values[0].equal(values[1])
    values[1].backward()
    linear_cross_entropy(hidden, weight, targets, vocab_size=7, fused=True, reduction="none")
    assert compiled == ["_loss_and_logit_gradient", "_chunk_losses"]


def test_a_custom_projection_gives_the_same_losses_and_gradients() -> None:
    hidden, weight, targets = problem((3, 11), 4, 7, 1)
    results = []
    for project in (None, lambda states: states @ weight.T):
        hidden.grad = weight.grad = None
        loss = linear_cross_entropy(hidden, weight, targets, vocab_size=7, chunk_tokens=10, project=project)
        loss.backward()
        results.append((loss.detach(), hidden.grad, weight.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-12)
