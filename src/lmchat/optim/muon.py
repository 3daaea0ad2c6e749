"""Muon's update of a stack of equally shaped matrices.

Nesterov momentum, made nearly orthogonal by Polar Express (arXiv:2505.16932), with NorMuon's variance reduction
(arXiv:2510.05491) and cautious weight decay. The matrices of a stack are independent: norms and products run over the
last two dimensions only, so splitting a stack, over calls or ranks, does not change the result.
"""

from __future__ import annotations

import torch
from torch import Tensor

POLAR_EXPRESS_COEFFICIENTS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
"""(a, b, c) of each step X ← aX + bXXᵀX + c(XXᵀ)²X."""

NORM_MARGIN = 1.02
"""Safety factor by which singular values start below 1, so that rounding does not push them above."""


def polar_express(matrices: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Approximates the nearest (semi-)orthogonal matrices; singular values end between about 0.86 and 1.14.

    Args:
        matrices: (K, rows, cols).
        dtype: dtype of the iteration and of the result; default is that of ``matrices``.
    """
    norms = torch.linalg.vector_norm(matrices, dim=(-2, -1), keepdim=True)
    x = (matrices * (NORM_MARGIN * norms + 1e-6).reciprocal()).to(dtype or matrices.dtype)
    tall = x.size(-2) > x.size(-1)
    for a, b, c in POLAR_EXPRESS_COEFFICIENTS:
        gram = x.mT @ x if tall else x @ x.mT
        # In this order each product is rounded once, which is three times as accurate in bf16 as term by term.
        square = torch.baddbmm(gram, gram, gram, beta=b / c)
        left, right = (x, square) if tall else (square, x)
        x = torch.baddbmm(x, left, right, beta=a, alpha=c)
    return x


def second_moment_shape(rows: int, cols: int) -> tuple[int, int]:
    """Shape of a matrix's second moment: one value per row, or per column if the matrix is wide."""
    return (rows, 1) if rows >= cols else (1, cols)


def reduce_variance(update: Tensor, second_moment: Tensor, beta2: float | Tensor) -> Tensor:
    """NorMuon: divides each row (column, if wide) by its running root mean square, keeping the Frobenius norm.

    Args:
        update: (K, rows, cols).
        second_moment: (K, rows, 1) or (K, 1, cols), updated in place; no bias correction.
        beta2: decay of the second moment.
    """
    axis = -1 if second_moment.size(-1) == 1 else -2
    mean_square = update.square().mean(dim=axis, keepdim=True)
    second_moment.lerp_(mean_square, 1 - beta2)
    scale = second_moment.clamp_min(1e-10).rsqrt()
    norm = mean_square.sum(dim=(-2, -1), keepdim=True).sqrt()
    scaled_norm = (mean_square * scale.square()).sum(dim=(-2, -1), keepdim=True).sqrt()
    return update * (scale * (norm / scaled_norm.clamp_min(1e-10)))


def muon_update(
    params: Tensor,
    grads: Tensor,
    momentum_buffers: Tensor,
    second_moments: Tensor,
    *,
    lr: float | Tensor,
    momentum: float | Tensor,
    weight_decay: float | Tensor,
    beta2: float | Tensor = 0.95,
    polar_dtype: torch.dtype | None = None,
) -> None:
    """Takes one step, in place on ``params``, ``momentum_buffers`` and ``second_moments``.

    The learning rate is multiplied by √max(1, rows / cols). Weight decay applies where update and parameter have the
    same sign, in the same subtraction as the update. Everything but the orthogonalisation is computed in the dtype of
    the parameters, including hyperparameters; nanochat rounds lr, weight decay and beta2 to bf16 with the update.

    Args:
        params: (K, rows, cols), like ``grads`` and ``momentum_buffers``.
        second_moments: (K, *second_moment_shape(rows, cols)).
        lr, momentum, weight_decay, beta2: numbers, or 0-dim tensors if the call is compiled.
        polar_dtype: dtype of `polar_express`; default is that of ``params``.
    """
    rows, cols = params.shape[-2:]
    momentum_buffers.lerp_(grads, 1 - momentum)
    nesterov = grads.lerp(momentum_buffers, momentum)
    update = polar_express(nesterov, polar_dtype).to(params.dtype)
    update = reduce_variance(update, second_moments, beta2)
    decay = weight_decay * params * (update * params >= 0)
    params.sub_((update + decay) * (lr * max(1, rows / cols) ** 0.5))
