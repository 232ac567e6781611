"""Confidence intervals of a mean, a share or a rank correlation over few held-out pairs.

`critical`: half the width of an interval in standard errors of a normal distribution, Z for one comparison and more for
one of several; `comparisons`: their number, each at a level divided by it (Bonferroni).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Column = NDArray[np.float64]

Z = 1.959964
"""Standard errors. Half of a 95 % interval of a normal distribution."""
MIN_TESTABLE_PAIRS = 6
"""Pairs. Below this a sign test cannot reach 5 %: 5 equal signs occur by chance with p = 2/2^5."""
SMALL_SAMPLE_PAIRS = 50
"""Pairs. With at most this many, the 95 % interval of a share is at least ± 14 points wide at 0.5."""
MIN_RECOMMENDED_PAIRS = 100
"""Pairs. Smallest number that is recommended: with fewer the variance itself is poorly estimated."""
ROUNDING_TOLERANCE = 1e-12
"""Differences below this are floating-point rounding."""
_MAX_RECOMMENDED_PAIRS = 200_000
"""Pairs. Largest number that is recommended: more are not available in practice."""


def small_sample_interval(mean: float, low: float, high: float, differences: Column) -> tuple[float, float]:
    """Return a bootstrap interval of a mean corrected for few observations.

    Args:
        mean: mean of `differences`.
        low: lower end of the percentile bootstrap's 95 % interval.
        high: upper end.
        differences: [N] averaged values, one per pair.

    Returns:
        Both ends, widened by Student's t and the N - 1 of the variance. Where fewer than MIN_TESTABLE_PAIRS values
        differ from 0 the interval includes 0: no sign-flip test of so few values can reject at 5 %.
    """
    count = len(differences)
    if count > 1:
        factor = math.sqrt(count / (count - 1)) * _student(count - 1) / Z
        low, high = mean - factor * (mean - low), mean + factor * (high - mean)
    return _reaching_zero(low, high, _differing(differences))


def joint_interval(mean: float, error: float, critical: float, differences: Column) -> tuple[float, float]:
    """Return the interval of a mean that is one of several, with Student's t in place of the normal distribution.

    Args:
        mean: mean of `differences`.
        error: its standard error, from the variance over all N (not N - 1) values.
        critical: see the module.
        differences: [N] averaged values, one per pair.

    Returns:
        Both ends; they include 0 where no sign-flip test of the values that differ from 0 can reject at that level.
    """
    from scipy.special import ndtr, stdtrit

    count = len(differences)
    level = 2 * float(ndtr(-critical))
    half = critical * error
    if count > 1:
        half = math.sqrt(count / (count - 1)) * float(stdtrit(count - 1, 1 - level / 2)) * error
    return _reaching_zero(mean - half, mean + half, _differing(differences), level)


def bonferroni(comparisons: float) -> float:
    """Return the critical value (see the module) of each of so many comparisons at 5 % together."""
    from scipy.special import ndtri

    return -float(ndtri(0.025 / max(1.0, comparisons)))


def share_interval(share: float, count: int, comparisons: int = 1) -> tuple[float, float]:
    """Return the exact 95 % interval of a share of `count` independent observations.

    Source: Clopper and Pearson, "The use of confidence or fiducial limits illustrated in the case of the binomial",
    1934.
    """
    from scipy.special import betaincinv

    hits = min(1.0, max(0.0, share)) * count  # floating-point sums can lie just outside [0, 1]
    tail = 0.025 / comparisons
    low = float(betaincinv(hits, count - hits + 1, tail)) if hits > 0 else 0.0
    high = float(betaincinv(hits + 1, count - hits, 1 - tail)) if hits < count else 1.0
    return low, high


def share_difference(a: float, b: float, count: int, comparisons: int = 1) -> tuple[float, float]:
    """Return the 95 % interval of a - b, two shares of `count` independent observations each.

    Source: Newcombe, "Interval estimation for the difference between independent proportions", 1998, method 10, with
    the exact intervals of the two shares: Wilson's are too narrow for fewer than ten observations.
    """
    (low_a, high_a), (low_b, high_b) = (share_interval(share, count, comparisons) for share in (a, b))
    low = a - b - math.hypot(a - low_a, high_b - b)
    high = a - b + math.hypot(high_a - a, b - low_b)
    return _reaching_zero(max(-1.0, low), min(1.0, high), count, 0.05 / comparisons)


def pairs_needed(mean: float, spread: float, pairs: int, critical: float = Z) -> int | None:
    """Return the estimated number of pairs at which a difference that is not clear now becomes clear.

    Args:
        mean: measured difference.
        spread: its standard deviation over pairs.
        pairs: number of pairs measured.
        critical: see the module.

    Returns:
        More than `pairs` and at least MIN_RECOMMENDED_PAIRS; None where the difference is 0 or needs more than
        200,000 pairs.
    """
    if mean == 0:
        return None
    needed = max(math.ceil((critical * spread / mean) ** 2), pairs + 1, MIN_RECOMMENDED_PAIRS)
    return needed if needed <= _MAX_RECOMMENDED_PAIRS else None


def is_clear_correlation(rho: float, count: int) -> bool:
    """Return whether a rank correlation over `count` pairs differs from 0 at the 5 % level (Student's t)."""
    if count < MIN_TESTABLE_PAIRS:
        return False
    return abs(rho) >= 1 or abs(rho) * math.sqrt((count - 2) / (1 - rho * rho)) > _student(count - 2)


def _student(degrees_of_freedom: int) -> float:
    """Return half the width of a 95 % interval of Student's t, in standard errors; `degrees_of_freedom` >= 1."""
    from scipy.special import stdtrit

    return float(stdtrit(degrees_of_freedom, 0.975))


def _differing(differences: Column) -> int:
    return int(np.sum(np.abs(differences) > ROUNDING_TOLERANCE))


def _reaching_zero(low: float, high: float, differing: int, level: float = 0.05) -> tuple[float, float]:
    """Return the interval, with 0 in it where `differing` equal signs are no rarer than `level` by chance."""
    return (low, high) if 2.0 ** (1 - differing) <= level else (min(low, 0.0), max(high, 0.0))
