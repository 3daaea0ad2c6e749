"""Cross-entropy computed in chunks of tokens, so that the full (tokens, vocabulary) logits are never in memory."""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lmchat.types import CHUNK_TOKENS, IGNORE_INDEX

Reduction = Literal["mean", "sum", "none"]

LOGIT_SOFTCAP = 15.0
"""Logits are bounded to ±15 by cap · tanh(logits / cap), in training and in sampling; exp(2 cap) does not overflow."""


def softcap(logits: Tensor) -> Tensor:
    """Bounds logits smoothly to ±`LOGIT_SOFTCAP` (Gemma 2, arXiv:2408.00118)."""
    return LOGIT_SOFTCAP * torch.tanh(logits / LOGIT_SOFTCAP)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    vocab_size: int,
    reduction: Reduction = "mean",
    weights: Tensor | None = None,
    token_losses: Tensor | None = None,
    chunk_tokens: int | None = None,
    fused: bool = False,
    project: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Cross-entropy of soft-capped logits ``hidden @ weight.T`` against `targets`.

    The forward pass also computes the gradients, chunk by chunk. Differentiable once.

    Args:
        hidden: (..., width), in the compute dtype.
        weight: (>= vocab_size, width); rows from `vocab_size` on are padding.
        targets: (...) integer ids, `IGNORE_INDEX` where no loss is computed.
        vocab_size: number of tokens.
        reduction: "sum", "mean" or "none". "mean" divides by the number of targets not ignored, not by their weights;
            "none", for evaluation, has no gradient.
        weights: (...) constant factor per token, for policy gradients.
        token_losses: (...) fp32, receives the losses that "sum" or "mean" add up, without gradient.
        chunk_tokens: tokens per chunk; default is that of the device in `CHUNK_TOKENS`.
        fused: compile the elementwise operations, which saves passes over a GPU's memory; no gain on a CPU.
        project: computes the raw logits (tokens, rows of weight) of (tokens, width) in another precision, such as FP8;
            used where "sum" or "mean" needs gradients, and differentiated by autograd.

    Returns:
        fp32 (fp64 for fp64 input): a scalar, or for "none" losses of the shape of `targets` with 0 at ignored targets.
        Without any target the loss and its gradient are 0.
    """
    assert reduction in ("mean", "sum", "none"), reduction
    flat_hidden, flat_targets = hidden.reshape(-1, hidden.size(-1)), targets.reshape(-1)
    live = flat_targets != IGNORE_INDEX
    coefficients = live.to(torch.promote_types(hidden.dtype, torch.float32))
    if weights is not None:
        coefficients = coefficients * weights.detach().reshape(-1)
    if reduction == "mean":
        coefficients = coefficients / live.sum().clamp(min=1)
    chunk_tokens = chunk_tokens or CHUNK_TOKENS.get(hidden.device.type, 1024)
    options = _Options(vocab_size, chunk_tokens, fused, project)
    if reduction == "none":
        with torch.no_grad():
            return _token_losses(flat_hidden, weight, flat_targets, coefficients, options).view(targets.shape)
    filtered = hidden.device.type == "cpu" and not live.all()
    if filtered:  # Needs a device sync on a GPU: how many targets there are.
        flat_hidden, flat_targets, coefficients = flat_hidden[live], flat_targets[live], coefficients[live]
    loss, losses = _SummedLoss.apply(flat_hidden, weight, flat_targets, coefficients, options)
    if token_losses is not None and filtered:
        token_losses.zero_().masked_scatter_(live.view(targets.shape), losses.to(token_losses.dtype))
    elif token_losses is not None:
        token_losses.copy_(losses.view(targets.shape))
    return loss


class _Options(NamedTuple):
    """Arguments of `linear_cross_entropy`."""

    vocab_size: int
    chunk_tokens: int
    fused: bool
    project: Callable[[Tensor], Tensor] | None = None


class _SummedLoss(torch.autograd.Function):
    """Σ coefficient · nll, a scalar, and its terms without gradient; the forward pass computes the gradients."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, coefficients: Tensor, options: _Options
    ) -> tuple[Tensor, Tensor]:
        if any(ctx.needs_input_grad):
            compute = _losses_and_gradients if options.project is None else _losses_and_projected_gradients
            losses, *gradients = compute(hidden, weight, targets, coefficients, options)
            ctx.save_for_backward(*gradients)
        else:
            losses = _token_losses(hidden, weight, targets, coefficients, options)
        ctx.mark_non_differentiable(losses)
        return losses.sum(), losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor, _: Tensor) -> Any:
        grad_hidden, grad_weight = ctx.saved_tensors
        # In fp32: rounding a loss scale such as 1 / 6 to bf16 would scale one of the two gradients differently.
        scaled_hidden = (grad_hidden.to(grad_output.dtype) * grad_output).to(grad_hidden.dtype)
        return scaled_hidden, grad_weight * grad_output, None, None, None


def _token_losses(hidden: Tensor, weight: Tensor, targets: Tensor, coefficients: Tensor, options: _Options) -> Tensor:
    """coefficient · nll (tokens,)."""
    losses = torch.empty_like(coefficients)
    chunk_losses = compiled(_chunk_losses) if options.fused else _chunk_losses
    for chunk, picks, logits in _logits(hidden, weight, targets, options):
        losses[chunk] = chunk_losses(logits, picks, coefficients[chunk])
    return losses


def _chunk_losses(logits: Tensor, picks: Tensor, scale: Tensor) -> Tensor:
    """scale · nll (tokens,) of raw logits (tokens, vocab), which are overwritten where their dtype allows."""
    capped = _sigmoid_(logits.to(scale.dtype)).mul_(2 * LOGIT_SOFTCAP)
    picked = capped.gather(1, picks)
    return (capped.exp_().sum(1).log() - picked.squeeze(1)) * scale


def _losses_and_gradients(
    hidden: Tensor, weight: Tensor, targets: Tensor, coefficients: Tensor, options: _Options
) -> tuple[Tensor, Tensor, Tensor]:
    """coefficient · nll (tokens,), and their sum's gradients by hidden (tokens, width) and weight (rows, width)."""
    vocab_size = options.vocab_size
    cast_weight = weight[:vocab_size].to(hidden.dtype)
    losses = torch.empty_like(coefficients)
    grad_hidden = torch.empty_like(hidden)
    grad_weight = torch.zeros_like(weight)
    differentiate = compiled(_loss_and_logit_gradient) if options.fused else _loss_and_logit_gradient
    for chunk, picks, logits in _logits(hidden, weight, targets, options):
        chunk_losses, grad = differentiate(logits, picks, coefficients[chunk, None], options.fused)
        losses[chunk] = chunk_losses[:, 0]
        torch.mm(grad, cast_weight, out=grad_hidden[chunk])
        grad_weight[:vocab_size] += grad.T @ hidden[chunk]
    return losses, grad_hidden, grad_weight


def _losses_and_projected_gradients(
    hidden: Tensor, weight: Tensor, targets: Tensor, coefficients: Tensor, options: _Options
) -> tuple[Tensor, Tensor, Tensor]:
    """`_losses_and_gradients` with `options.project` as the output head, differentiated by autograd."""
    assert options.project is not None
    losses = torch.empty_like(coefficients)
    grad_hidden = torch.empty_like(hidden)
    grad_weight = torch.zeros_like(weight)
    differentiate = compiled(_loss_and_logit_gradient) if options.fused else _loss_and_logit_gradient
    for start in range(0, len(targets), options.chunk_tokens):
        chunk = slice(start, start + options.chunk_tokens)
        picks, scale = targets[chunk, None].clamp(min=0), coefficients[chunk, None]
        with torch.enable_grad():
            states = hidden[chunk].detach().requires_grad_()
            logits = options.project(states)
        values = logits.detach()[:, : options.vocab_size]
        if values.dtype == scale.dtype:
            values = values.clone()  # overwritten below, and autograd owns the logits
        chunk_losses, grad = differentiate(values, picks, scale, options.fused)
        losses[chunk] = chunk_losses[:, 0]
        grad = torch.nn.functional.pad(grad, (0, len(weight) - options.vocab_size))
        grad_hidden[chunk], chunk_grad_weight = torch.autograd.grad(logits, (states, weight), grad)
        grad_weight += chunk_grad_weight
    return losses, grad_hidden, grad_weight


def _loss_and_logit_gradient(
    logits: Tensor, picks: Tensor, scale: Tensor, fused: bool = False
) -> tuple[Tensor, Tensor]:
    """scale · nll (tokens, 1) and its gradient by the raw logits (tokens, vocab), in place where their dtype allows.

    cap · tanh(z / cap) = 2 cap · s - cap with s = sigmoid(2 z / cap); the constant cancels in the softmax p. So
    nll = log Σ exp(2 cap · s) - 2 cap · s[target], and d nll / dz = (p - onehot) · 4 s (1 - s). ``fused`` is for the
    compiler: without a scatter, which would materialize the fp32 gradient.
    """
    s, cap = _sigmoid_(logits.to(scale.dtype)), LOGIT_SOFTCAP
    picked = s.gather(1, picks)
    grad = (s * (2 * cap)).exp_()
    normalizer = grad.sum(1, keepdim=True)
    losses = (normalizer.log() - 2 * cap * picked) * scale
    grad.mul_(4 * scale / normalizer).mul_(s.addcmul_(s, s, value=-1))
    target_grad = 4 * scale * picked * (1 - picked)
    if fused:
        is_target = torch.arange(logits.size(1), device=logits.device) == picks
        grad = torch.where(is_target, grad - target_grad, grad)
    else:
        grad.scatter_add_(1, picks, -target_grad)
    return losses, grad.to(logits.dtype)


def _sigmoid_(logits: Tensor) -> Tensor:
    """sigmoid(2 logits / cap) in place: half the cost of tanh on a CPU, accurate to 1e-6 of a logit."""
    return logits.mul_(2 / LOGIT_SOFTCAP).sigmoid_()


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function compiled for fixed shapes, one graph per shape."""
    return torch.compile(function, dynamic=False)


def _logits(
    hidden: Tensor, weight: Tensor, targets: Tensor, options: _Options
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yields each chunk's slice, its targets (tokens, 1) with 0 at ignored ones, and its raw logits (tokens, vocab).

    All chunks share one buffer for the logits, which the caller may overwrite; new memory would cost page faults.
    """
    vocab_size, chunk_tokens = options.vocab_size, options.chunk_tokens
    cast_weight = weight[:vocab_size].to(hidden.dtype)
    buffer = hidden.new_empty(min(chunk_tokens, len(targets)), vocab_size)
    for start in range(0, len(targets), chunk_tokens):
        chunk = slice(start, min(start + chunk_tokens, len(targets)))
        logits = torch.mm(hidden[chunk], cast_weight.T, out=buffer[: chunk.stop - start])
        yield chunk, targets[chunk, None].clamp(min=0), logits
