"""Simultaneous confidence intervals of differences between trials, from the same bootstrap draws of the held-out pairs.

The best of many trials looks better than it is. A family of intervals here holds all its true differences together in
95 % of sweeps, so that it also holds those of a trial that was chosen by them (single-step max-t: Westfall and Young,
"Resampling-Based Multiple Testing", 1993; Romano and Wolf, "Exact and approximate stepdown methods for multiple
hypothesis testing", 2005; Hothorn, Bretz and Westfall, "Simultaneous inference in general parametric models", 2008):

1. Each draw resamples the pairs, the same ones for all trials, so that the correlation of trials counts.
2. The critical value is the 95 % quantile over draws of the largest deviation of the family, in standard errors.
3. Each interval is the mean plus and minus that many standard errors, with Student's t.

Where a configuration was trained with several seeds, the variance between seeds, pooled over configurations, is part of
each standard error, and each draw adds noise of that variance (Student's t with the seeds' degrees of freedom).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

from dashboards.analysis.small_samples import (
    ROUNDING_TOLERANCE,
    Z,
    bonferroni,
    joint_interval,
    pairs_needed,
    small_sample_interval,
)

Column = NDArray[np.float64]

RESAMPLES = 2000
MAX_DRAWN_TRIALS = 150
"""Trials. Differences between more are corrected by Bonferroni's rule: their pairs would take seconds."""
_LEVEL = 0.05
_MIN_DRAWS = 20
"""Draws beyond a quantile. With fewer, it is not known from draws."""
_SEED = 0
_CACHED_ROWS = 4000
"""Rows. Bootstrap counts of at most this many rows are cached (64 MB)."""
_BLOCK = 4_000_000
"""Numbers computed at once."""
_TAIL = 2.5
"""Percent outside the interval of one difference at each end."""
_CONSTANT = 1e-12
"""Variance relative to that of the compared columns. Below, their difference is constant up to rounding."""


@dataclass(frozen=True, slots=True)
class Difference:
    """A mean difference with its 95 % intervals, in units of the metric."""

    mean: float
    low: float
    high: float
    """With `low`, the interval of this difference by itself, as if it had not been chosen among others."""
    pair_count: int
    spread: float
    """Standard deviation of the difference over pairs."""
    paired: bool = True
    joint: tuple[float, float] | None = None
    """Interval that holds together with those of the whole family; None where there is one comparison."""
    comparisons: int = 1
    """Size of the family."""
    critical: float = Z
    """Half the width of the joint interval, in standard errors of a normal distribution."""

    @property
    def joint_low(self) -> float:
        """Lower end of the interval that conclusions use."""
        return self.low if self.joint is None else self.joint[0]

    @property
    def joint_high(self) -> float:
        """Upper end of the interval that conclusions use."""
        return self.high if self.joint is None else self.joint[1]

    @property
    def reversed(self) -> Difference:
        """The same difference with both sides exchanged."""
        joint = None if self.joint is None else (-self.joint[1], -self.joint[0])
        return replace(self, mean=-self.mean, low=-self.high, high=-self.low, joint=joint)

    @property
    def is_clear(self) -> bool:
        """Whether the joint interval excludes 0."""
        return self.joint_low > 0 or self.joint_high < 0

    @property
    def pairs_needed(self) -> int | None:
        """Estimated number of held-out pairs at which a difference of this size becomes clear; None where too many."""
        return pairs_needed(self.mean, self.spread, self.pair_count, self.critical)


@dataclass(frozen=True, slots=True, eq=False)
class SeedVariance:
    """Variance of each column's mean between trainings with other seeds, [K], and the degrees of freedom behind it."""

    of_means: Column
    degrees_of_freedom: int


class PairedColumns:
    """Values of K trials on the same N pairs, [N, K], with bootstrap draws of their means."""

    def __init__(self, values: Column, *, share: bool = False, seeds: SeedVariance | None = None) -> None:
        """Draw the means. `share`: the values lie in [0, 1], or are differences of such values."""
        self.values = values
        self._share = share
        self._seed_variances = np.zeros(values.shape[1]) if seeds is None else seeds.of_means
        self.means = values.mean(axis=0)
        self.deviations: Column = resample(values) - self.means
        """[RESAMPLES, K] of the drawn means from the means."""
        if seeds is not None:
            self.deviations = self.deviations + _seed_noise(seeds)

    @cached_property
    def critical_of_pairs(self) -> float:
        """Critical value of the differences between all pairs of columns."""
        count = self.values.shape[1]
        if count > MAX_DRAWN_TRIALS:
            return bonferroni(count * (count - 1) / 2)
        centered = self.values - self.means
        covariance = centered.T @ centered / len(centered)

        def blocks() -> Iterator[tuple[Column, Column]]:
            own = np.diag(covariance)
            for k in range(count - 1):
                sums = own[k] + own[k + 1 :]
                variances = sums - 2 * covariance[k, k + 1 :]
                variances[variances <= _CONSTANT * sums] = 0.0
                seeds = self._seed_variances[k] + self._seed_variances[k + 1 :]
                yield self.deviations[:, [k]] - self.deviations[:, k + 1 :], variances / len(centered) + seeds

        return _critical_value(blocks(), _LEVEL)

    def difference(self, a: int, b: int) -> Difference:
        """Return column a minus column b, jointly with the differences between all pairs of columns."""
        count = self.values.shape[1]
        return self._make(
            self.values[:, a] - self.values[:, b],
            self.deviations[:, a] - self.deviations[:, b],
            float(self._seed_variances[a] + self._seed_variances[b]),
            self.critical_of_pairs,
            count * (count - 1) // 2,
        )

    def contrasts(self, weights: Column) -> list[Difference]:
        """Return weighted sums of the columns, jointly with each other.

        Args:
            weights: [K, contrasts]; those of a contrast sum to 0.
        """
        compared, drawn = self.values @ weights, self.deviations @ weights
        seeds = (weights**2).T @ self._seed_variances
        variances = compared.var(axis=0)
        variances[variances <= _CONSTANT * ((weights**2).T @ self.values.var(axis=0))] = 0.0
        critical = _critical_value([(drawn, variances / len(compared) + seeds)], _LEVEL)
        bounds = np.maximum(weights, 0).sum(axis=0)
        return [
            self._make(compared[:, k], drawn[:, k], float(seeds[k]), critical, weights.shape[1], float(bounds[k]))
            for k in range(weights.shape[1])
        ]

    def each(self, comparisons: int) -> list[Difference]:
        """Return each column, itself differences, jointly with the others.

        `comparisons`: at least K; more where trials that are no columns could also have been chosen.
        """
        count = self.values.shape[1]
        variances = self.values.var(axis=0) / len(self.values) + self._seed_variances
        level = _LEVEL * count / comparisons
        critical = bonferroni(comparisons)
        if level * RESAMPLES >= _MIN_DRAWS:
            critical = min(critical, _critical_value([(self.deviations, variances)], level))
        return [
            self._make(self.values[:, k], self.deviations[:, k], float(self._seed_variances[k]), critical, comparisons)
            for k in range(count)
        ]

    def _make(
        self,
        differences: Column,
        deviations: Column,
        seed_variance: float,
        critical: float,
        comparisons: int,
        bound: float = 1.0,
    ) -> Difference:
        mean = float(differences.mean())
        low, high = (float(end) for end in mean + np.percentile(deviations, [_TAIL, 100 - _TAIL]))
        low, high = small_sample_interval(mean, low, high, differences)
        joint = (low, high)
        if comparisons > 1:
            error = math.sqrt(float(differences.var()) / len(differences) + seed_variance)
            wide = joint_interval(mean, error, critical, differences)
            joint = (min(low, wide[0]), max(high, wide[1]))
        ends = [low, high, *joint]
        if self._share:
            ends = [min(max(end, -bound), bound) for end in ends]
        mean, low, high, *joint_ends = (0.0 if abs(v) < ROUNDING_TOLERANCE else v for v in (mean, *ends))
        spread = float(differences.std(ddof=1)) if len(differences) > 1 else 0.0
        return Difference(
            mean,
            low,
            high,
            len(differences),
            spread,
            joint=(joint_ends[0], joint_ends[1]) if comparisons > 1 else None,
            comparisons=comparisons,
            critical=critical if comparisons > 1 else Z,
        )


def resample(matrix: Column) -> Column:
    """Return the means of each column over RESAMPLES bootstrap resamples of the rows: [RESAMPLES, columns]."""
    rows = len(matrix)
    resampled = _cached_draws(rows) if rows <= _CACHED_ROWS else _draws(rows)
    return np.concatenate([counts @ matrix for counts in resampled]) / rows


def _draws(rows: int) -> Iterator[Column]:
    """Yield the multinomial counts of the rows, RESAMPLES resamples in blocks that fit into memory."""
    rng = np.random.default_rng(_SEED)
    block = max(1, 2_000_000 // rows)
    for begin in range(0, RESAMPLES, block):
        size = min(block, RESAMPLES - begin)
        yield rng.multinomial(rows, np.full(rows, 1 / rows), size=size).astype(np.float64)


@lru_cache(maxsize=1)
def _cached_draws(rows: int) -> tuple[Column, ...]:
    """Cache the counts: a diagnosis compares many columns of the same rows."""
    return tuple(_draws(rows))


def _seed_noise(seeds: SeedVariance) -> Column:
    """Return [RESAMPLES, K] draws of Student's t with the seeds' variances; one chi-square a draw, as it is pooled."""
    rng = np.random.default_rng(_SEED + 1)
    scale = np.sqrt(seeds.degrees_of_freedom / rng.chisquare(seeds.degrees_of_freedom, (RESAMPLES, 1)))
    return scale * rng.standard_normal((RESAMPLES, len(seeds.of_means))) * np.sqrt(seeds.of_means)


def _critical_value(blocks: Iterable[tuple[Column, Column]], level: float) -> float:
    """Return the 1 - `level` quantile of the largest deviation in standard errors, at least that of one comparison.

    `blocks`: deviations [RESAMPLES, contrasts] and the squares of their standard errors [contrasts]; one that is 0 has
    no deviation.
    """
    largest = np.zeros(RESAMPLES)
    for deviations, variances in blocks:
        varied = np.flatnonzero(variances > 0)
        step = max(1, _BLOCK // RESAMPLES)
        for begin in range(0, len(varied), step):
            chosen = varied[begin : begin + step]
            scaled = np.abs(deviations[:, chosen]) / np.sqrt(variances[chosen])
            largest = np.maximum(largest, scaled.max(axis=1))
    return max(Z, float(np.quantile(largest, 1 - level)))
