"""Losses over token logits, computed in pieces so that a (tokens x vocabulary) table is never held in full."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lmchat.types import IGNORE_INDEX

Reduction = Literal["mean", "sum", "none"]

LOGIT_SOFTCAP = 15.0
"""Logits are bounded to ±15 by cap · tanh(logits / cap), in training and in sampling."""

CHUNK_TOKENS = 512
"""Tokens whose logits exist at one time."""


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
    chunk_tokens: int = CHUNK_TOKENS,
) -> Tensor:
    """Cross-entropy of soft-capped logits ``hidden @ weight.T`` against `targets`.

    hidden: (..., width), in the compute dtype. weight: (>= vocab_size, width); rows from `vocab_size` on are padding.
    targets: (...) integer ids, `IGNORE_INDEX` where no loss is taken. weights: (...) constant factor per token,
    for policy gradients.

    Returns fp32 (fp64 for fp64 input): "sum" and "mean" a scalar, "none" the shape of `targets` with 0 at ignored
    targets. "mean" divides by the number of targets not ignored, whatever their weights. With no such target the loss
    is 0 and so is its gradient.

    The gradients are computed together with the loss, chunk by chunk, while the logits are at hand; "none" computes
    them again in the backward pass.
    """
    flat_targets = targets.reshape(-1)
    flat_hidden = hidden.reshape(-1, hidden.size(-1))
    live = flat_targets != IGNORE_INDEX
    coefficients = live.to(_accumulation_dtype(hidden.dtype))
    if weights is not None:
        coefficients = coefficients * weights.detach().reshape(-1)
    if reduction == "mean":
        coefficients = coefficients / live.sum().clamp(min=1)
    function = _TokenLosses if reduction == "none" else _SummedLoss
    loss = function.apply(flat_hidden, weight, flat_targets, coefficients, vocab_size, softcap, chunk_tokens)
    return loss.view(targets.shape) if reduction == "none" else loss


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


class _SummedLoss(torch.autograd.Function):
    """Σ coefficient · nll, a scalar, its gradients computed in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        coefficients: Tensor,
        vocab_size: int,
        cap: float,
        chunk_tokens: int,
    ) -> Tensor:
        if not any(ctx.needs_input_grad[:2]):
            return _token_losses(hidden, weight, targets, coefficients, vocab_size, cap, chunk_tokens).sum()
        losses, grad_hidden, grad_weight = _losses_and_gradients(
            hidden, weight, targets, coefficients, vocab_size, cap, chunk_tokens
        )
        ctx.save_for_backward(grad_hidden, grad_weight)
        return losses.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        grad_hidden, grad_weight = ctx.saved_tensors
        return (
            grad_hidden * grad_output.to(grad_hidden.dtype),
            grad_weight * grad_output,
            *[None] * 5,
        )


class _TokenLosses(torch.autograd.Function):
    """coefficient · nll per token, its gradients computed in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        coefficients: Tensor,
        vocab_size: int,
        cap: float,
        chunk_tokens: int,
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, targets, coefficients)
        ctx.options = (vocab_size, cap, chunk_tokens)
        return _token_losses(hidden, weight, targets, coefficients, vocab_size, cap, chunk_tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        hidden, weight, targets, coefficients = ctx.saved_tensors
        _, grad_hidden, grad_weight = _losses_and_gradients(
            hidden, weight, targets, coefficients * grad_output, *ctx.options
        )
        return grad_hidden, grad_weight, *[None] * 5


def _token_losses(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    coefficients: Tensor,
    vocab_size: int,
    cap: float,
    chunk_tokens: int,
) -> Tensor:
    weight = weight[:vocab_size].to(hidden.dtype)
    losses = torch.empty_like(coefficients)
    for chunk in _chunks(len(targets), chunk_tokens):
        logits = softcap((hidden[chunk] @ weight.T).to(losses.dtype), cap)
        picked = logits.gather(1, targets[chunk].clamp(min=0)[:, None])[:, 0]
        losses[chunk] = (logits.logsumexp(1) - picked) * coefficients[chunk]
    return losses


def _losses_and_gradients(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    coefficients: Tensor,
    vocab_size: int,
    cap: float,
    chunk_tokens: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses (tokens,), and the gradients of their sum by hidden (tokens, width) and weight (rows, width)."""
    cast_weight = weight[:vocab_size].to(hidden.dtype)
    losses = torch.empty_like(coefficients)
    grad_hidden = torch.empty_like(hidden)
    grad_weight = torch.zeros_like(weight)
    for chunk in _chunks(len(targets), chunk_tokens):
        picks = targets[chunk].clamp(min=0)[:, None]
        scale = coefficients[chunk][:, None]
        bounded = torch.tanh((hidden[chunk] @ cast_weight.T).to(losses.dtype) / cap)
        logits = bounded * cap
        log_normalizer = logits.logsumexp(1, keepdim=True)
        losses[chunk] = ((log_normalizer - logits.gather(1, picks)) * scale)[:, 0]
        # d nll / d logits is softmax - onehot; d (cap tanh(z / cap)) / dz is 1 - tanh².
        grad = torch.exp(logits - log_normalizer) * scale
        grad = grad.scatter_add(1, picks, -scale) * (1 - bounded * bounded)
        grad = grad.to(hidden.dtype)
        grad_hidden[chunk] = grad @ cast_weight
        grad_weight[:vocab_size] += grad.T @ hidden[chunk]
    return losses, grad_hidden, grad_weight


def _chunks(tokens: int, chunk_tokens: int) -> list[slice]:
    return [slice(start, start + chunk_tokens) for start in range(0, tokens, chunk_tokens)]
