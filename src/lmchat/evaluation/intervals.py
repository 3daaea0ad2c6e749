"""Confidence intervals of evaluation results."""

from __future__ import annotations

import math

Z_95 = 1.959963984540054
"""97.5th percentile of the standard normal distribution."""


def wilson_interval(successes: float, trials: int, z: float = Z_95) -> tuple[float, float]:
    """Wilson's score interval of a proportion (Wilson 1927, doi:10.1080/01621459.1927.10502953).

    Args:
        successes: number of successes, 0 … trials.
        trials: number of trials; 0 gives (0, 1).
        z: quantile of the normal distribution; the default gives 95 %.

    Returns:
        Lower and upper bound, in 0 … 1.
    """
    if trials == 0:
        return 0.0, 1.0
    share, spread = successes / trials, z * z / trials
    center = (share + spread / 2) / (1 + spread)
    half_width = z / (1 + spread) * math.sqrt(share * (1 - share) / trials + spread / (4 * trials))
    return max(0.0, center - half_width), min(1.0, center + half_width)
