"""Advantages: how much better a sample is than the others of its group."""

from __future__ import annotations

import torch
from torch import Tensor


def group_advantages(rewards: Tensor) -> Tensor:
    """Rewards minus the mean of their group; not divided by the standard deviation (Dr. GRPO, arXiv:2503.20783).

    Args:
        rewards: (samples,) float, of one group.

    Returns:
        (samples,) advantages, exactly 0 where all rewards are equal: their mean may be rounded, and the optimizers
        take a step for any gradient that is not 0. A group of one has zero advantage.
    """
    return torch.zeros_like(rewards) if rewards.min() == rewards.max() else rewards - rewards.mean()
