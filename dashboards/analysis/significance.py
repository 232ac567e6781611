"""Significance of a ranking by a paired bootstrap over the held-out pairs, which all trials share."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from dashboards.analysis.held_out_pairs import Column, metric_by_pair
from dashboards.analysis.small_samples import ROUNDING_TOLERANCE, pairs_needed, share_difference, small_sample_interval
from dashboards.analysis.sweep_frame import SweepFrame, TrialFrame
from trainer.metrics import base_name

RESAMPLES = 2000
_SEED = 0
_CACHED_ROWS = 4000
"""Rows. Bootstrap counts of at most this many rows are cached (64 MB)."""
_TAIL = 2.5
"""Percent outside the interval at each end."""
_FRACTION_METRICS = ("accuracies/logp", "rewards/accuracies", "exact_answers")


@dataclass(frozen=True, slots=True)
class Difference:
    """A mean difference with its 95 % interval, in units of the metric."""

    mean: float
    low: float
    high: float
    pair_count: int
    spread: float
    """Standard deviation of the difference over pairs."""
    paired: bool = True

    @property
    def is_clear(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low > 0 or self.high < 0

    @property
    def pairs_needed(self) -> int | None:
        """Estimated number of held-out pairs at which a difference of this size becomes clear; None where too many."""
        return pairs_needed(self.mean, self.spread, self.pair_count)


@dataclass(frozen=True, slots=True, eq=False)
class Significance:
    """Significance of the winner against the other complete trials (`runners_up`, best first)."""

    winner: TrialFrame
    pair_count: int
    """Held-out pairs; 0 where no comparison was possible."""
    paired: bool
    against_initial: Difference | None
    runners_up: tuple[tuple[TrialFrame, Difference], ...]
    """Trial and winner minus trial; positive where the winner's metric is higher."""
    first_place_shares: dict[int, float]
    """Trial -> share of bootstrap resamples in which it ranks first, ties divided; empty without pairs."""
    not_distinguishable: tuple[TrialFrame, ...]
    """Trials whose difference to the winner is not clear, the winner first."""


def analyze_significance(frame: SweepFrame) -> Significance | None:
    """Return the significance of the best trial; None before a complete trial keeps the sweep's requirements."""
    ranked = frame.eligible
    if not ranked:
        return None
    winner = ranked[0]
    columns = _columns(frame, ranked)
    if columns is None:
        return _unpaired(frame, ranked)
    matrix, known = columns
    resampled = resample(matrix)
    position = {trial.number: k for k, trial in enumerate(known)}
    runners_up: list[tuple[TrialFrame, Difference]] = []
    for trial in ranked[1:]:
        k = position.get(trial.number)
        if k is not None:
            differences = matrix[:, 0] - matrix[:, k]
            runners_up.append(
                (trial, _interval(differences, resampled[:, 0] - resampled[:, k], is_share(frame.objective.metric)))
            )
    shares = _first_place_shares(frame.sign * resampled)
    first_place_shares = {trial.number: float(shares[k]) for k, trial in enumerate(known)}
    return Significance(
        winner=winner,
        pair_count=len(matrix),
        paired=True,
        against_initial=_against_initial(frame, winner),
        runners_up=tuple(runners_up),
        first_place_shares=first_place_shares,
        not_distinguishable=(winner, *(trial for trial, difference in runners_up if not difference.is_clear)),
    )


def _first_place_shares(resampled: Column) -> Column:
    """Return how often each column is the highest, ties divided equally."""
    first = resampled >= resampled.max(axis=1, keepdims=True) - ROUNDING_TOLERANCE
    return np.mean(first / first.sum(axis=1, keepdims=True), axis=0)


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


def is_share(metric: str) -> bool:
    """Return whether a metric is a share of pairs or prompts, so that differences lie in [-1, 1]."""
    return base_name(metric) in _FRACTION_METRICS


def paired_difference(a: Column, b: Column, metric: str) -> Difference:
    """Return the mean of a - b with its interval; `a` and `b` are values of `metric` on the same pairs, [N] each."""
    differences = a - b
    return _interval(differences, resample(differences[:, None])[:, 0], is_share(metric))


def trial_values(frame: SweepFrame, trial: TrialFrame, metric: str | None = None) -> Column | None:
    """Return the metric (default: the objective) on each held-out pair after training, [N]; None without pairs.

    Of a configuration trained with several seeds: the mean over them.
    """
    if trial.held_out_pairs is None:
        return None
    same = [pairs for pairs in trial.seed_pairs if pairs.same_pairs(trial.held_out_pairs)]
    if len(same) < len(trial.seed_pairs) or len(same) < trial.record.complete_seeds:
        same = []  # some seeds lack these pairs: the best one stands for them
    each = [
        metric_by_pair(metric or frame.objective.metric, p, trial.config.loss) for p in same or [trial.held_out_pairs]
    ]
    values = [column for column in each if column is not None]
    return np.mean(values, axis=0) if values else None


def _columns(frame: SweepFrame, ranked: Sequence[TrialFrame]) -> tuple[NDArray[np.float64], list[TrialFrame]] | None:
    """Return one column per trial, the winner's first; None where the winner has no held-out pairs."""
    first = ranked[0].held_out_pairs
    if first is None:
        return None
    known: list[TrialFrame] = []
    columns: list[Column] = []
    for trial in ranked:
        values = trial_values(frame, trial)
        if values is not None and trial.held_out_pairs is not None and trial.held_out_pairs.same_pairs(first):
            known.append(trial)
            columns.append(values)
    return (np.stack(columns, axis=1), known) if known and known[0] is ranked[0] else None


def _interval(differences: Column, resampled: Column, share: bool) -> Difference:
    """Return the interval of the mean of `differences`; `resampled`: its bootstrap means."""
    mean = float(differences.mean())
    low, high = (float(end) for end in np.percentile(resampled, [_TAIL, 100 - _TAIL]))
    low, high = small_sample_interval(mean, low, high, differences)
    if share:
        low, high = max(low, -1.0), min(high, 1.0)
    mean, low, high = (0.0 if abs(value) < ROUNDING_TOLERANCE else value for value in (mean, low, high))
    return Difference(
        mean, low, high, len(differences), float(differences.std(ddof=1)) if len(differences) > 1 else 0.0
    )


def _against_initial(frame: SweepFrame, trial: TrialFrame) -> Difference | None:
    after = trial_values(frame, trial)
    initial = None if trial.held_out_pairs is None else trial.held_out_pairs.initial()
    before = None if initial is None else metric_by_pair(frame.objective.metric, initial, trial.config.loss)
    if after is not None and before is not None:
        return paired_difference(after, before, frame.objective.metric)
    return _unpaired_difference(frame, trial.record.value, frame.initial_value(frame.objective.metric))


def _unpaired(frame: SweepFrame, ranked: Sequence[TrialFrame]) -> Significance:
    """Compare without held-out pairs: only shares have a known variance, that of two independent samples."""
    winner = ranked[0]
    found = [(trial, _unpaired_difference(frame, winner.record.value, trial.record.value)) for trial in ranked[1:]]
    runners_up = tuple((trial, difference) for trial, difference in found if difference is not None)
    pair_count = runners_up[0][1].pair_count if runners_up else 0
    indistinguishable = (winner, *(trial for trial, difference in runners_up if not difference.is_clear))
    against = _unpaired_difference(frame, winner.record.value, frame.initial_value(frame.objective.metric))
    return Significance(winner, pair_count, False, against, runners_up, {}, indistinguishable)


def _unpaired_difference(frame: SweepFrame, a: float | None, b: float | None) -> Difference | None:
    if a is None or b is None or not is_share(frame.objective.metric):
        return None
    counts_prompts = base_name(frame.objective.metric) == "exact_answers"
    count = frame.spec.base.evaluation.prompts if counts_prompts else 0 if frame.data is None else frame.data.eval_rows
    if count < 1:
        return None
    spread = math.sqrt(a * (1 - a) + b * (1 - b))
    return Difference(a - b, *share_difference(a, b, count), count, spread, paired=False)
