"""Advantages of samples relative to their group."""

from __future__ import annotations

import torch
from torch import Tensor


def group_advantages(rewards: Tensor) -> Tensor:
    """Rewards minus the mean of the group, not divided by the standard deviation (Dr. GRPO, arXiv:2503.20783).

    Args:
        rewards: (samples,) float, rewards of one group.

    Returns:
        (samples,) advantages; exactly 0 if all rewards are equal, also if their mean is rounded.
    """
    return torch.zeros_like(rewards) if rewards.min() == rewards.max() else rewards - rewards.mean()
