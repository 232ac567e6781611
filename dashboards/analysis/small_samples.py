"""Confidence intervals for few held-out pairs: of a mean, a share or a rank correlation."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Column = NDArray[np.float64]

Z = 1.959964
"""Standard errors. Half of a 95 % interval of a normal distribution."""
FEWEST_PAIRS = 6
"""Pairs. Where fewer differ, all of them fall on one side by chance in at least 2 / 2^5 = 6 of 100 cases."""
FEW_PAIRS = 50
"""Pairs. Up to here a share is known to 14 points at best."""
FEWEST_ADVISED = 100
"""Pairs. No advice asks for fewer: the spread seen over less is hardly known, and a share is known to 10 points."""
NOTHING = 1e-12
"""Below this a difference is the rounding of a sum, not a difference."""
_MOST_ADVISED = 200_000
"""Pairs. More than anybody holds out: a difference that needs them is as good as none."""


def widened(mean: float, low: float, high: float, differences: Column) -> tuple[float, float]:
    """Return a bootstrap interval of a mean corrected for few observations.

    Args:
        mean: mean of `differences`.
        low: lower end of the percentile bootstrap's 95 % interval.
        high: upper end.
        differences: [N] what was averaged, one value a pair.

    Returns:
        The ends, widened by Student's t and the N - 1 of the variance. Where fewer than FEWEST_PAIRS values differ from
        0 the interval reaches 0: no sign-flip test of so few can reject at 5 %.
    """
    count = len(differences)
    if count > 1:
        factor = math.sqrt(count / (count - 1)) * _student(count - 1) / Z
        low, high = mean - factor * (mean - low), mean + factor * (high - mean)
    return _reaching_zero(low, high, int(np.sum(np.abs(differences) > NOTHING)))


def share_interval(share: float, count: int) -> tuple[float, float]:
    """Return the exact 95 % interval of a share of `count` independent observations.

    Source: Clopper and Pearson, "The use of confidence or fiducial limits illustrated in the case of the binomial",
    1934.
    """
    from scipy.special import betaincinv

    hits = min(1.0, max(0.0, share)) * count  # sums of floats end up just outside
    low = float(betaincinv(hits, count - hits + 1, 0.025)) if hits > 0 else 0.0
    high = float(betaincinv(hits + 1, count - hits, 0.975)) if hits < count else 1.0
    return low, high


def share_difference(a: float, b: float, count: int) -> tuple[float, float]:
    """Return the 95 % interval of a - b, two shares of `count` independent observations each.

    Source: Newcombe, "Interval estimation for the difference between independent proportions", 1998, method 10, with
    the exact intervals of the two shares: Wilson's are too narrow for fewer than ten observations.
    """
    (low_a, high_a), (low_b, high_b) = share_interval(a, count), share_interval(b, count)
    low = a - b - math.hypot(a - low_a, high_b - b)
    high = a - b + math.hypot(high_a - a, b - low_b)
    return _reaching_zero(max(-1.0, low), min(1.0, high), count)


def pairs_needed(mean: float, spread: float, pairs: int) -> int | None:
    """Return about how many pairs would make a difference clear that `pairs` pairs do not.

    Args:
        mean: the difference seen.
        spread: standard deviation of it over pairs.
        pairs: how many there were.

    Returns:
        More than `pairs` and at least FEWEST_ADVISED; None where there is no difference, or one too small to show.
    """
    if mean == 0:
        return None
    needed = max(math.ceil((Z * spread / mean) ** 2), pairs + 1, FEWEST_ADVISED)
    return needed if needed <= _MOST_ADVISED else None


def is_clear_correlation(rho: float, count: int) -> bool:
    """Check whether a rank correlation over `count` pairs can be told from none at 5 %, by Student's t."""
    if count < FEWEST_PAIRS:
        return False
    return abs(rho) >= 1 or abs(rho) * math.sqrt((count - 2) / (1 - rho * rho)) > _student(count - 2)


def _student(freedom: int) -> float:
    """Half of a 95 % interval of Student's t in standard errors; `freedom` at least 1."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, 0.975))


def _reaching_zero(low: float, high: float, differing: int) -> tuple[float, float]:
    return (low, high) if differing >= FEWEST_PAIRS else (min(low, 0.0), max(high, 0.0))
