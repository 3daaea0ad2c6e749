"""AdamW's update (arXiv:1711.05101), in torch's fused kernel: one pass over memory for all tensors of a call."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.adamw import adamw


def adamw_update(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """Takes one step, in place on everything but ``grads``.

    p ← p(1 − lr·wd); m ← lerp(m, g, 1−β₁); v ← lerp(v, g², 1−β₂); p ← p − lr/(1−β₁ᵗ) · m / (√(v/(1−β₂ᵗ)) + eps).
    Elementwise, so splitting a tensor does not change the result.

    Args:
        params: tensors of any shape; ``grads``, ``exp_avgs`` (m) and ``exp_avg_sqs`` (v) correspond one to one.
        steps: 0-dim fp32 tensors on the parameters' devices, number of previous steps (t − 1).
    """
    adamw(
        params,
        [_laid_out_as(param, grad) for param, grad in zip(params, grads, strict=True)],
        exp_avgs,
        exp_avg_sqs,
        [],
        steps,
        fused=True,
        amsgrad=False,
        maximize=False,
        lr=lr,
        beta1=betas[0],
        beta2=betas[1],
        eps=eps,
        weight_decay=weight_decay,
    )


def _laid_out_as(param: Tensor, grad: Tensor) -> Tensor:
    """The gradient with the parameter's strides, since the fused kernel ignores strides."""
    return grad if grad.stride() == param.stride() else torch.empty_like(param).copy_(grad)
