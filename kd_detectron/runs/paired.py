"""Differences to a baseline, paired by seed, with their 95 % confidence intervals.

The seed decides the order of the images and all random numbers, so that two runs of one seed have
more in common than two others: the spread of their difference is the one that counts. Over n seeds
the mean difference has the interval mean ± t s / sqrt(n), with s the sample standard deviation of
the differences and t the 97.5 % quantile of Student's t with n - 1 degrees of freedom.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

# 97.5 % quantiles of Student's t for 1 to 10 degrees of freedom.
_QUANTILES = (12.70620, 4.30265, 3.18245, 2.77645, 2.57058, 2.44691, 2.36462, 2.30600, 2.26216)
_QUANTILES += (2.22814,)


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds; with two or more its sample deviation, or its 95 % interval if paired."""

    mean: float
    deviation: float | None = None
    low: float | None = None
    high: float | None = None


def mean_and_deviation(values: Sequence[float]) -> Estimate:
    """The mean of n values and their sample standard deviation (n - 1)."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return Estimate(statistics.fmean(values), deviation)


def t_quantile(degrees: int) -> float:
    """The 97.5 % quantile of Student's t, to four digits.

    Above ten degrees of freedom by the Cornish-Fisher expansion around the normal quantile
    (Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.5).
    """
    if degrees <= len(_QUANTILES):
        return _QUANTILES[degrees - 1]
    z = statistics.NormalDist().inv_cdf(0.975)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / degrees + second / degrees**2 + third / degrees**3


def ratio_with_interval(gains: Sequence[float], gaps: Sequence[float]) -> Estimate:
    """The ratio of the mean gain to the mean gap, and its 95 % interval.

    The interval is that of a ratio estimate: the residuals ``gain - ratio * gap`` of the n seeds
    take the place of the deviations from the mean, so that a seed with a weak baseline, where gain
    and gap are both large, does not count as spread.

    Args:
        gains: n differences to the baseline.
        gaps: the n distances from the baseline to the teacher, with a positive mean; all 1 for the
            mean gain itself.
    """
    gap = statistics.fmean(gaps)
    ratio, count = statistics.fmean(gains) / gap, len(gains)
    if count < 2:
        return Estimate(ratio)
    residuals = [gain - ratio * distance for gain, distance in zip(gains, gaps, strict=True)]
    half = t_quantile(count - 1) * statistics.stdev(residuals) / math.sqrt(count) / gap
    return Estimate(ratio, low=ratio - half, high=ratio + half)
