"""Confidence intervals of evaluation results."""

import math
from collections.abc import Sequence

import numpy as np

Z_95 = 1.959963984540054
"""97.5th percentile of the standard normal distribution."""
REPLICATES = 10_000
"""Bootstrap samples; the same random numbers at every call."""


def wilson_interval(successes: float, trials: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of a proportion (Wilson 1927, doi:10.1080/01621459.1927.10502953).

    Returns:
        Lower and upper bound, in 0 … 1; (0, 1) without trials.
    """
    if trials == 0:
        return 0.0, 1.0
    share, spread = successes / trials, Z_95 * Z_95 / trials
    center = (share + spread / 2) / (1 + spread)
    half_width = Z_95 / (1 + spread) * math.sqrt(share * (1 - share) / trials + spread / (4 * trials))
    return max(0.0, center - half_width), min(1.0, center + half_width)


def mean_with_interval(values: Sequence[float], counts: Sequence[int]) -> tuple[float, tuple[float, float]]:
    """A mean over questions, of which ``counts[i]`` have the value ``values[i]``, and its 95 % interval.

    A share, where all values are 0 or 1, has Wilson's interval, another mean the percentile bootstrap interval.

    Args:
        values: distinct values, in 0 … 1.
        counts: number of questions with each value.

    Returns:
        The mean, NaN without questions; lower and upper bound.
    """
    total = sum(counts)
    if total == 0:
        return math.nan, (0.0, 1.0)
    mean = math.fsum(value * count for value, count in zip(values, counts, strict=True)) / total
    if all(value in (0, 1) for value, count in zip(values, counts, strict=True) if count):
        return mean, wilson_interval(mean * total, total)
    drawn = np.random.default_rng(0).multinomial(total, np.array(counts) / total, size=REPLICATES)
    low, high = np.quantile(drawn @ np.array(values) / total, [0.025, 0.975])
    return mean, (float(low), float(high))


def bootstrap_interval(
    correct: Sequence[int], trials: Sequence[int], baselines: Sequence[float], replicates: int = REPLICATES
) -> tuple[float, float]:
    """95 % percentile bootstrap interval of a mean of centered accuracies (Efron 1979, doi:10.1214/aos/1176344552).

    The questions of each task are resampled with replacement; the number of correct ones among them is binomial.

    Args:
        correct, trials: correct answers and questions of each task; at least one question.
        baselines: accuracy of each task that is centered at 0.
        replicates: number of bootstrap samples.

    Returns:
        2.5th and 97.5th percentile of the mean.
    """
    accuracies = np.array(correct) / trials
    drawn = np.random.default_rng(0).binomial(trials, accuracies, size=(replicates, len(trials))) / trials
    means = ((drawn - baselines) / (1 - np.array(baselines))).mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)
