"""How sure a ranking is: bootstrap over the held-out pairs, paired, as all trials saw the same ones."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from dashboards.analysis.held_out_pairs import Column, per_pair
from dashboards.analysis.small_samples import NOTHING, pairs_needed, share_difference, widened
from dashboards.analysis.sweep_frame import SweepFrame, TrialCase
from trainer.metrics import base_name

RESAMPLES = 2000
_SEED = 0
_KEPT = 4000
"""Draws of up to this many rows are kept: at most 64 MB."""
_TAIL = 2.5
_SHARES = ("accuracies/logp", "rewards/accuracies", "exact_answers")


@dataclass(frozen=True, slots=True)
class Difference:
    """A mean difference with its 95 % interval, in the goal's own units."""

    mean: float
    low: float
    high: float
    pairs: int
    spread: float
    """Standard deviation of the difference over pairs."""
    paired: bool = True

    @property
    def clear(self) -> bool:
        """Whether the interval leaves 0 out."""
        return self.low > 0 or self.high < 0

    @property
    def pairs_needed(self) -> int | None:
        """About how many held-out pairs would make a difference of this size clear that is not clear now, more than
        there are; None where there is none.
        """
        return pairs_needed(self.mean, self.spread, self.pairs)


@dataclass(frozen=True, slots=True, eq=False)
class Certainty:
    """What may be said of the winner. `rivals` are the other complete trials, best first."""

    winner: TrialCase
    pairs: int
    """Held-out pairs; 0 where no comparison was possible."""
    paired: bool
    against_start: Difference | None
    rivals: tuple[tuple[TrialCase, Difference], ...]
    """Winner minus rival; positive: more of the goal's metric."""
    wins: dict[int, float]
    """Share of resamples of the pairs in which each trial would have won, a tie shared; empty without pairs."""
    tied: tuple[TrialCase, ...]
    """Trials whose difference to the winner is not clear, the winner first."""


def certainty(frame: SweepFrame) -> Certainty | None:
    """How sure the winner is; None before any trial is complete."""
    ranked = frame.ranked
    if not ranked:
        return None
    winner = ranked[0]
    columns = _columns(frame, ranked)
    if columns is None:
        return _unpaired(frame, ranked)
    matrix, known = columns
    drawn = resample(matrix)
    place = {case.number: k for k, case in enumerate(known)}
    rivals: list[tuple[TrialCase, Difference]] = []
    for case in ranked[1:]:
        k = place.get(case.number)
        if k is not None:
            gaps = matrix[:, 0] - matrix[:, k]
            rivals.append((case, _interval(gaps, drawn[:, 0] - drawn[:, k], is_share(frame.goal.metric))))
    shares = _shares(frame.sign * drawn)
    wins = {case.number: float(shares[k]) for k, case in enumerate(known)}
    return Certainty(
        winner=winner,
        pairs=len(matrix),
        paired=True,
        against_start=_against_start(frame, winner),
        rivals=tuple(rivals),
        wins=wins,
        tied=(winner, *(case for case, difference in rivals if not difference.clear)),
    )


def _shares(drawn: Column) -> Column:
    """How often each column is the highest; where several are, the draw is shared among them."""
    first = drawn >= drawn.max(axis=1, keepdims=True) - NOTHING
    return np.mean(first / first.sum(axis=1, keepdims=True), axis=0)


def resample(matrix: Column) -> Column:
    """Means of each column over RESAMPLES bootstrap draws of the rows, the same draws for all: [RESAMPLES, columns]."""
    rows = len(matrix)
    drawn = _kept_draws(rows) if rows <= _KEPT else _draws(rows)
    return np.concatenate([counts @ matrix for counts in drawn]) / rows


def _draws(rows: int) -> Iterator[Column]:
    """How often each row is drawn, RESAMPLES times, in blocks that fit into memory."""
    rng = np.random.default_rng(_SEED)
    block = max(1, 2_000_000 // rows)
    for begin in range(0, RESAMPLES, block):
        size = min(block, RESAMPLES - begin)
        yield rng.multinomial(rows, np.full(rows, 1 / rows), size=size).astype(np.float64)


@lru_cache(maxsize=1)
def _kept_draws(rows: int) -> tuple[Column, ...]:
    """A diagnosis compares many columns of the same rows: their draws are made once."""
    return tuple(_draws(rows))


def is_share(metric: str) -> bool:
    """Whether a metric is a share of pairs or prompts, so that no difference of it is beyond 1."""
    return base_name(metric) in _SHARES


def paired_difference(a: Column, b: Column, metric: str) -> Difference:
    """Mean of a - b over the same pairs, with its interval; both are values of `metric`."""
    gaps = a - b
    return _interval(gaps, resample(gaps[:, None])[:, 0], is_share(metric))


def case_values(frame: SweepFrame, case: TrialCase, metric: str | None = None) -> Column | None:
    """The goal's value on each held-out pair after training; None where the trial left none."""
    if case.pairs is None:
        return None
    return per_pair(metric or frame.goal.metric, case.pairs, case.config.loss)


def _columns(frame: SweepFrame, ranked: Sequence[TrialCase]) -> tuple[NDArray[np.float64], list[TrialCase]] | None:
    """One column a trial, the winner's first; None where the winner has none."""
    first = ranked[0].pairs
    if first is None:
        return None
    known: list[TrialCase] = []
    columns: list[Column] = []
    for case in ranked:
        values = case_values(frame, case)
        if values is not None and case.pairs is not None and case.pairs.same_pairs(first):
            known.append(case)
            columns.append(values)
    return (np.stack(columns, axis=1), known) if known and known[0] is ranked[0] else None


def _interval(gaps: Column, drawn: Column, share: bool) -> Difference:
    """`drawn`: means of resamples of `gaps`."""
    mean = float(gaps.mean())
    low, high = (float(end) for end in np.percentile(drawn, [_TAIL, 100 - _TAIL]))
    low, high = widened(mean, low, high, gaps)
    if share:
        low, high = max(low, -1.0), min(high, 1.0)
    mean, low, high = (0.0 if abs(value) < NOTHING else value for value in (mean, low, high))
    return Difference(mean, low, high, len(gaps), float(gaps.std(ddof=1)) if len(gaps) > 1 else 0.0)


def _against_start(frame: SweepFrame, case: TrialCase) -> Difference | None:
    after = case_values(frame, case)
    start = None if case.pairs is None else case.pairs.at_start()
    before = None if start is None else per_pair(frame.goal.metric, start, case.config.loss)
    if after is not None and before is not None:
        return paired_difference(after, before, frame.goal.metric)
    return _apart(frame, case.record.value, frame.start(frame.goal.metric))


def _unpaired(frame: SweepFrame, ranked: Sequence[TrialCase]) -> Certainty:
    """Without the pairs only shares have a known spread: that of two independent samples, which is wider."""
    winner = ranked[0]
    found = [(case, _apart(frame, winner.record.value, case.record.value)) for case in ranked[1:]]
    rivals = tuple((case, difference) for case, difference in found if difference is not None)
    pairs = rivals[0][1].pairs if rivals else 0
    tied = (winner, *(case for case, difference in rivals if not difference.clear))
    against = _apart(frame, winner.record.value, frame.start(frame.goal.metric))
    return Certainty(winner, pairs, False, against, rivals, {}, tied)


def _apart(frame: SweepFrame, a: float | None, b: float | None) -> Difference | None:
    if a is None or b is None or not is_share(frame.goal.metric):
        return None
    of_answers = base_name(frame.goal.metric) == "exact_answers"
    count = frame.spec.base.evaluation.prompts if of_answers else 0 if frame.data is None else frame.data.eval_rows
    if count < 1:
        return None
    spread = math.sqrt(a * (1 - a) + b * (1 - b))
    return Difference(a - b, *share_difference(a, b, count), count, spread, paired=False)
