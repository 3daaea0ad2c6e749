"""Losses over token logits, computed in pieces so that a (tokens x vocabulary) table is never held in full."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lmchat.types import IGNORE_INDEX

Reduction = Literal["mean", "sum", "none"]

LOGIT_SOFTCAP = 15.0
"""Logits are bounded to ±15 by cap · tanh(logits / cap), in training and in sampling."""

CHUNK_TOKENS = {"cpu": 512, "cuda": 4096}
"""Tokens whose logits exist at one time. On a CPU they should stay in its cache; a GPU wants large products.
The CUDA figure is an estimate, not a measurement."""


def softcap(logits: Tensor, cap: float = LOGIT_SOFTCAP) -> Tensor:
    """Bound logits smoothly to ±cap (Gemma 2, arXiv:2408.00118)."""
    return cap * torch.tanh(logits / cap)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    vocab_size: int,
    softcap: float = LOGIT_SOFTCAP,
    reduction: Reduction = "mean",
    weights: Tensor | None = None,
    chunk_tokens: int | None = None,
) -> Tensor:
    """Cross-entropy of soft-capped logits ``hidden @ weight.T`` against `targets`.

    hidden: (..., width), in the compute dtype. weight: (>= vocab_size, width); rows from `vocab_size` on are padding.
    targets: (...) integer ids, `IGNORE_INDEX` where no loss is taken. softcap: at most 50, so that exp(logits) stays
    in range without looking for the largest. weights: (...) constant factor per token, for policy gradients.
    chunk_tokens: by default that of the device in `CHUNK_TOKENS`.

    Returns fp32 (fp64 for fp64 input): "sum" and "mean" a scalar, "none" the shape of `targets` with 0 at ignored
    targets. "mean" divides by the number of targets not ignored, whatever their weights. With no such target the loss
    is 0 and so is its gradient.

    The gradients are computed together with the loss, chunk by chunk, while the logits are at hand; "none" computes
    the logits again in the backward pass. Differentiable once.
    """
    assert 0 < softcap <= 50, softcap
    assert reduction in ("mean", "sum", "none"), reduction
    flat_targets = targets.reshape(-1)
    live = flat_targets != IGNORE_INDEX
    coefficients = live.to(torch.promote_types(hidden.dtype, torch.float32))
    if weights is not None:
        coefficients = coefficients * weights.detach().reshape(-1)
    if reduction == "mean":
        coefficients = coefficients / live.sum().clamp(min=1)
    function = _TokenLosses if reduction == "none" else _SummedLoss
    options = (vocab_size, softcap, chunk_tokens or CHUNK_TOKENS.get(hidden.device.type, 1024))
    loss = function.apply(hidden.reshape(-1, hidden.size(-1)), weight, flat_targets, coefficients, options)
    return loss.view(targets.shape) if reduction == "none" else loss


_Options = tuple[int, float, int]  # vocab_size, softcap, chunk_tokens


class _SummedLoss(torch.autograd.Function):
    """Σ coefficient · nll, a scalar, its gradients computed in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, coefficients: Tensor, options: _Options
    ) -> Tensor:
        if not any(ctx.needs_input_grad):
            return _token_losses(hidden, weight, targets, coefficients, options).sum()
        losses, *gradients = _losses_and_gradients(hidden, weight, targets, coefficients, options)
        ctx.save_for_backward(*gradients)
        return losses.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad_output.to(grad_hidden.dtype), grad_weight * grad_output, None, None, None


class _TokenLosses(torch.autograd.Function):
    """coefficient · nll per token, its gradients computed in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, coefficients: Tensor, options: _Options
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, targets, coefficients)
        ctx.options = options
        return _token_losses(hidden, weight, targets, coefficients, options)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        hidden, weight, targets, coefficients = ctx.saved_tensors
        _, *gradients = _losses_and_gradients(hidden, weight, targets, coefficients * grad_output, ctx.options)
        return *gradients, None, None, None


def _token_losses(hidden: Tensor, weight: Tensor, targets: Tensor, coefficients: Tensor, options: _Options) -> Tensor:
    """coefficient · nll (tokens,)."""
    losses = torch.empty_like(coefficients)
    for chunk, picks, bounded in _bounded_logits(hidden, weight, targets, coefficients.dtype, options):
        logits = bounded.mul_(options[1])
        picked = logits.gather(1, picks)
        losses[chunk] = (logits.exp_().sum(1).log() - picked[:, 0]) * coefficients[chunk]
    return losses


def _losses_and_gradients(
    hidden: Tensor, weight: Tensor, targets: Tensor, coefficients: Tensor, options: _Options
) -> tuple[Tensor, Tensor, Tensor]:
    """coefficient · nll (tokens,), and the gradients of their sum by hidden (tokens, width) and weight (rows, width).

    With z the raw logits, b = tanh(z / cap) and p = softmax(cap · b), d nll / dz = (p - onehot)(1 - b²).
    """
    vocab_size, cap, _ = options
    cast_weight = weight[:vocab_size].to(hidden.dtype)
    losses = torch.empty_like(coefficients)
    grad_hidden = torch.empty_like(hidden)
    grad_weight = torch.zeros_like(weight)
    for chunk, picks, bounded in _bounded_logits(hidden, weight, targets, coefficients.dtype, options):
        scale = coefficients[chunk, None]
        picked = bounded.gather(1, picks)
        grad = (bounded * cap).exp_()
        normalizer = grad.sum(1, keepdim=True)
        losses[chunk] = ((normalizer.log() - cap * picked) * scale)[:, 0]
        grad.mul_(scale / normalizer)
        grad.addcmul_(grad, bounded.square_(), value=-1)
        grad.scatter_add_(1, picks, scale * (picked.square() - 1))
        grad = grad.to(hidden.dtype)
        torch.mm(grad, cast_weight, out=grad_hidden[chunk])
        grad_weight[:vocab_size] += grad.T @ hidden[chunk]
    return losses, grad_hidden, grad_weight


def _bounded_logits(
    hidden: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype, options: _Options
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Per chunk: its slice, its targets (tokens, 1) with 0 at ignored ones, and tanh(logits / cap) in `dtype`.

    The logits of all chunks share one buffer, which the caller may overwrite: fresh memory for each would cost a page
    fault per 4 KB.
    """
    vocab_size, cap, chunk_tokens = options
    cast_weight = weight[:vocab_size].to(hidden.dtype)
    buffer = hidden.new_empty(min(chunk_tokens, len(targets)), vocab_size)
    for start in range(0, len(targets), chunk_tokens):
        chunk = slice(start, min(start + chunk_tokens, len(targets)))
        logits = torch.mm(hidden[chunk], cast_weight.T, out=buffer[: chunk.stop - start])
        yield chunk, targets[chunk, None].clamp(min=0), logits.to(dtype).div_(cap).tanh_()
