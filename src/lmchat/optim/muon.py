"""Muon's update of a stack of equally shaped matrices.

Nesterov momentum, made nearly orthogonal by Polar Express (arXiv:2505.16932), with NorMuon's variance reduction
(arXiv:2510.05491) and cautious weight decay. Every matrix of a stack is treated alone: norms and products stay within
its last two dimensions, so any split of a stack, over calls or over ranks, gives the same numbers.
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
"""Singular values start below 1 by this factor, so that rounding does not lift them above."""


def polar_express(matrices: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The nearest (semi-)orthogonal matrices, up to singular values between about 0.86 and 1.14.

    matrices: (K, rows, cols). dtype: of the iteration and of the result, by default that of ``matrices``.
    """
    norms = torch.linalg.vector_norm(matrices, dim=(-2, -1), keepdim=True)
    x = (matrices * (NORM_MARGIN * norms + 1e-6).reciprocal()).to(dtype or matrices.dtype)
    tall = x.size(-2) > x.size(-1)
    for a, b, c in POLAR_EXPRESS_COEFFICIENTS:
        gram = x.mT @ x if tall else x @ x.mT
        # c last: each product is rounded once, which makes bf16 three times more accurate than term by term.
        square = torch.baddbmm(gram, gram, gram, beta=b / c)
        left, right = (x, square) if tall else (square, x)
        x = torch.baddbmm(x, left, right, beta=a, alpha=c)
    return x


def second_moment_shape(rows: int, cols: int) -> tuple[int, int]:
    """Shape of a matrix's second moment: one value per row, or per column where the matrix is wide."""
    return (rows, 1) if rows >= cols else (1, cols)


def reduce_variance(update: Tensor, second_moment: Tensor, beta2: float | Tensor) -> Tensor:
    """NorMuon: divides each row (column, if wide) by its running root mean square, keeping the Frobenius norm.

    update: (K, rows, cols). second_moment: (K, rows, 1) or (K, 1, cols), updated in place; no bias correction.
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
    """One step, in place on ``params``, ``momentum_buffers`` and ``second_moments``.

    The learning rate is taken × √max(1, rows / cols). The decay goes into the same subtraction as the update, where
    update and parameter agree in sign. All arithmetic but the orthogonalisation is in the dtype of the parameters,
    hyperparameters too; nanochat rounds lr, weight decay and beta2 to bf16 with the update.

    Args:
        params: (K, rows, cols); ``grads`` and ``momentum_buffers`` likewise.
        second_moments: (K, *second_moment_shape(rows, cols)).
        lr, momentum, weight_decay, beta2: numbers, or 0-dim tensors where the call is compiled.
        polar_dtype: of `polar_express`, by default that of ``params``.
    """
    rows, cols = params.shape[-2:]
    momentum_buffers.lerp_(grads, 1 - momentum)
    nesterov = grads.lerp(momentum_buffers, momentum)
    update = polar_express(nesterov, polar_dtype).to(params.dtype)
    update = reduce_variance(update, second_moments, beta2)
    decay = weight_decay * params * (update * params >= 0)
    params.sub_((update + decay) * (lr * max(1, rows / cols) ** 0.5))
