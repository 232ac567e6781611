"""Comparison of the finalists: means over seeds and held-out pairs, simultaneous intervals, and which one to use.

The standard error of a mean is that of a hierarchical bootstrap: seeds are drawn anew for each configuration, then
held-out pairs. These are the same for every seed and configuration, so that they are drawn once for all (Owen, "The
pigeonhole bootstrap", Annals of Applied Statistics 2007): drawing them for each seed would count their noise as if the
seeds averaged it out. As few seeds are too small a population to draw from, their deviations are widened by
sqrt(S / (S - 1)), and the variance between seeds is pooled over the finalists. Intervals use Student's t for each part,
that of the seeds and that of the pairs, each with its own degrees of freedom (Cochran and Cox, "Experimental Designs",
1957): Satterthwaite's, which few seeds estimate badly, gave too narrow ones with two or three seeds.
Bonferroni's correction makes them hold together: of the means, and of the gains over the initial model, for all
finalists, of differences for all pairs of finalists, as the best of them is chosen by these values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.config.base import FrozenModel

Matrix = NDArray[np.float64]

RESAMPLES = 2000
ERROR_RATE = 0.05
"""Of all intervals of one kind together."""
NOTABLE, NOTABLE_NATS = 1.1, 0.01
"""Of tied finalists, what counts as more than the least distance or cost: this ratio; of distances also this gap."""
_RANDOM_STATE = 0
_BLOCK = 2_000_000
"""Numbers drawn at a time."""


@dataclass(frozen=True, slots=True, eq=False)
class FinalistSample:
    """What one finalist was measured by.

    `of`: the first trial of its configuration; `values`: [S, N], the objective of each seed on each held-out pair, or
    [S, 1], its value alone; `cost`: training pairs; `distance` from the initial model, nats per token; None if unknown.
    """

    of: int
    values: Matrix
    cost: float
    distance: float | None = None


class Interval(FrozenModel):
    """A mean or a difference with its simultaneous 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def is_clear(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low > 0 or self.high < 0


class ConfirmedValue(FrozenModel):
    """A finalist's mean, and how far it is behind the one with the best mean; None for that one.

    `gain`: over the initial model on the same rows, positive where it is better; None where that was not measured.
    """

    of: int
    seeds: int
    mean: Interval
    behind: Interval | None
    gain: Interval | None = None


class Confirmation(FrozenModel):
    """The comparison of the finalists. Configurations are named by their first trial in the search.

    `trials`: the finalists' trials that were compared; `pairs`: held-out pairs, 0 if only seeds could be counted;
    `tied`: the configurations that are not clearly behind the best mean, itself among them.
    """

    trials: tuple[int, ...]
    pairs: int
    values: tuple[ConfirmedValue, ...]
    tied: tuple[int, ...]
    recommended: int
    reason: str

    @property
    def of(self) -> tuple[int, ...]:
        """The finalists."""
        return tuple(value.of for value in self.values)

    @property
    def gain(self) -> Interval | None:
        """How much better the recommended configuration is than the initial model; None where unknown."""
        return next(value.gain for value in self.values if value.of == self.recommended)

    @property
    def text(self) -> str:
        """The result in one to three sentences."""
        counted = f"seeds and {self.pairs:,} held-out pairs" if self.pairs else "seeds alone"
        corrected = f", corrected for {len(self.values)} finalists" if len(self.values) > 1 else ""
        return f"{self.reason} (intervals count {counted}{corrected}).{self._gain_text}"

    def as_json(self, search_values: Mapping[int, Any]) -> dict[str, Any]:
        """Return it as `status --json`, `best --json` and `report --json` have it.

        `search_values`: the values in the search of the finalists, and of others, by first trial.
        """
        before = {str(of): value for of, value in search_values.items() if of in self.of}
        return self.model_dump(mode="json") | {"text": self.text, "search_values": before}

    @property
    def _gain_text(self) -> str:
        gain = self.gain
        if gain is None:
            return ""
        found = f"gain {gain.value:+.3g}, 95 % interval {gain.low:+.3g} to {gain.high:+.3g}"
        if not self.pairs:
            word = "better" if gain.value > 0 else "no better"  # other rows could say otherwise
        elif gain.value > 0:
            word = "clearly better" if gain.is_clear else "not clearly better"
        else:
            word = "clearly worse" if gain.is_clear else "no better"
        return f" It is {word} than the initial model on the same rows ({found})."


def compare_finalists(
    samples: Sequence[FinalistSample], trials: Sequence[int], sign: float, initial: Matrix | None = None
) -> Confirmation:
    """Return the comparison of one finalist or more, each with two seeds or more.

    Args:
        samples: The finalists, in the order of the search's ranking.
        trials: The trials that they consist of.
        sign: 1 to maximize the objective, -1 to minimize it.
        initial: The initial model's objective on each held-out pair, [N], or alone, [1]; None if unknown.
    """
    draws, start = _bootstrap_means(samples, initial)
    count, seeds = len(samples), _seed_variance(samples)
    best = max(range(count), key=lambda k: sign * samples[k].values.mean())
    pairs = max(1, len(list(combinations(range(count), 2))))
    values: list[ConfirmedValue] = []
    for k, sample in enumerate(samples):
        behind = None
        if k != best:
            apart = sign * float(samples[best].values.mean() - sample.values.mean())
            behind = _interval(apart, draws[best] - draws[k], (samples[best], sample), seeds, pairs)
        mean = _interval(float(sample.values.mean()), draws[k], (sample,), seeds, count)
        gain = None
        if initial is not None and start is not None:
            more = sign * float(sample.values.mean() - initial.mean())
            gain = _interval(more, draws[k] - start, (sample,), seeds, count)
        values.append(ConfirmedValue(of=sample.of, seeds=len(sample.values), mean=mean, behind=behind, gain=gain))
    near = [s for s, v in zip(samples, values, strict=True) if v.behind is None or not v.behind.is_clear]
    tied = sorted(near, key=lambda s: (s is not samples[best], -sign * float(s.values.mean())))
    recommended, reason = _recommend(tied, count)
    width = samples[0].values.shape[1]
    return Confirmation(
        trials=tuple(sorted(trials)),
        pairs=width if width > 1 else 0,
        values=tuple(sorted(values, key=lambda v: -sign * v.mean.value)),
        tied=tuple(sample.of for sample in tied),
        recommended=recommended.of,
        reason=reason,
    )


def _bootstrap_means(samples: Sequence[FinalistSample], initial: Matrix | None) -> tuple[list[Matrix], Matrix | None]:
    """Return the means of each finalist and of the initial model over RESAMPLES resamples, [RESAMPLES] each.

    Pairs are drawn once for all.
    """
    rng = np.random.default_rng(_RANDOM_STATE)
    width = samples[0].values.shape[1]
    out: list[list[Matrix]] = [[] for _ in samples]
    start: list[Matrix] = []
    block = max(1, _BLOCK // width)
    for begin in range(0, RESAMPLES, block):
        size = min(block, RESAMPLES - begin)
        weights = rng.multinomial(width, np.full(width, 1 / width), size=size) / width
        if initial is not None:
            start.append(weights @ initial)
        for found, sample in zip(out, samples, strict=True):
            seeds = len(sample.values)
            by_seed = weights @ sample.values.T
            middle = by_seed.mean(axis=1, keepdims=True)
            widened = middle + (by_seed - middle) * math.sqrt(seeds / (seeds - 1))
            chosen = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=size) / seeds
            found.append((widened * chosen).sum(axis=1))
    return [np.concatenate(found) for found in out], np.concatenate(start) if start else None


@dataclass(frozen=True, slots=True)
class _SeedVariance:
    """Variance between the means of two seeds' trainings, pooled over the finalists, and its degrees of freedom."""

    value: float
    freedom: int


def _seed_variance(samples: Sequence[FinalistSample]) -> _SeedVariance:
    freedom = sum(len(s.values) - 1 for s in samples)
    squares = sum(float(s.values.mean(axis=1).var(ddof=1)) * (len(s.values) - 1) for s in samples)
    return _SeedVariance(squares / freedom, freedom)


def _interval(
    value: float, draws: Matrix, samples: Sequence[FinalistSample], seeds: _SeedVariance, count: int
) -> Interval:
    """Return the interval of a mean, or of a difference of two; `count`: intervals that have to hold together."""
    from scipy.stats import t

    own = sum(float(s.values.mean(axis=1).var(ddof=1)) / len(s.values) for s in samples)
    of_pairs, width = max(0.0, float(draws.var(ddof=1)) - own), samples[0].values.shape[1]
    of_seeds, level = sum(seeds.value / len(s.values) for s in samples), 1 - ERROR_RATE / (2 * count)
    half = math.sqrt(
        float(t.ppf(level, seeds.freedom)) ** 2 * of_seeds
        + (float(t.ppf(level, width - 1)) ** 2 * of_pairs if width > 1 else 0.0)
    )
    return Interval(value=value, low=value - half, high=value + half)


def _recommend(tied: Sequence[FinalistSample], count: int) -> tuple[FinalistSample, str]:
    """Return which of the tied finalists to use, the best mean's first, and why.

    Of those notably closest to the initial model the notably cheapest, of these the best mean: far from the initial
    model a held-out metric says less about the answers (Chen et al., arXiv 2405.19534).
    """
    first = tied[0]
    name = f"trial {first.of}'s configuration"
    if count == 1:
        return first, f"{name} is the only finalist"
    if len(tied) == 1:
        return first, f"{name} is clearly better than the other finalists"
    listed = ", ".join(str(sample.of) for sample in sorted(tied, key=lambda sample: sample.of))
    head = f"the configurations of trials {listed} are tied"
    left = list(tied)
    distances = [sample.distance for sample in tied if sample.distance is not None]
    if len(distances) == len(tied):
        least = min(distances)
        left = [s for s, d in zip(tied, distances, strict=True) if d <= NOTABLE * least or d - least <= NOTABLE_NATS]
    cheapest = [s for s in left if s.cost <= NOTABLE * min(sample.cost for sample in left)]
    chosen, why = cheapest[0], "has the best mean, and none is notably closer to the initial model or cheaper"
    if first not in left:
        why = f"is closer to the initial model ({chosen.distance:.3g} nats per token against {first.distance:.3g})"
    elif first not in cheapest:
        why = f"trains on fewer pairs ({chosen.cost:,.0f} against {first.cost:,.0f})"
    return chosen, f"{head}; trial {chosen.of}'s is recommended, as it {why}"


def parse_confirmation(stored: Any) -> Confirmation | None:
    """Return the comparison that a study stores; None without one."""
    return None if stored is None else Confirmation.model_validate(stored)
