"""Significance of a ranking by a paired bootstrap over the held-out pairs, which all trials share.

Every conclusion rests on intervals that hold together (`simultaneous_intervals`): gains over the initial model over all
trials that could have won, differences between trials over all pairs of trials, as the winner was chosen among them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np

from dashboards.analysis.distance import log_ratio
from dashboards.analysis.held_out_pairs import Column, HeldOutPairs, metric_by_pair
from dashboards.analysis.simultaneous_intervals import Difference, PairedColumns, SeedVariance
from dashboards.analysis.small_samples import ROUNDING_TOLERANCE, bonferroni, share_difference
from dashboards.analysis.sweep_frame import SweepFrame, TrialFrame
from dashboards.formatting import format_brief, format_count, format_duration
from orchestrator.study.trial_records import TrialState
from trainer.metrics import KL, LOG_RATIO_CHOSEN, base_name

_FRACTION_METRICS = ("accuracies/logp", "rewards/accuracies", "exact_answers")


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


@dataclass(frozen=True, slots=True, eq=False)
class ComparedTrials:
    """The complete trials with the same held-out pairs as the best one, the columns of `columns`, best first."""

    trials: tuple[TrialFrame, ...]
    columns: PairedColumns
    gains: dict[int, Difference]
    """Trial number -> trial minus initial model, of the trials with the initial model's log-probs."""

    def position(self, trial: TrialFrame) -> int | None:
        """Return the trial's column; None if it has none."""
        return next((k for k, each in enumerate(self.trials) if each.number == trial.number), None)

    def difference(self, a: TrialFrame, b: TrialFrame) -> Difference | None:
        """Return a minus b, jointly over all pairs of these trials; None if one of the two is not among them."""
        of_a, of_b = self.position(a), self.position(b)
        return None if of_a is None or of_b is None else self.columns.difference(of_a, of_b)


_COMPARED: WeakKeyDictionary[SweepFrame, ComparedTrials | None] = WeakKeyDictionary()


def compared_trials(frame: SweepFrame) -> ComparedTrials | None:
    """Return the sweep's trials with their common pairs, computed once a frame; None where the best one has none."""
    if frame not in _COMPARED:
        _COMPARED[frame] = _compared_trials(frame)
    return _COMPARED[frame]


def _compared_trials(frame: SweepFrame) -> ComparedTrials | None:
    best = next(iter(frame.eligible or frame.ranked), None)
    if best is None or best.held_out_pairs is None:
        return None
    known: list[TrialFrame] = []
    values: list[Column] = []
    for trial in frame.ranked:
        column = trial_values(frame, trial)
        if (
            column is not None
            and trial.held_out_pairs is not None
            and trial.held_out_pairs.same_pairs(best.held_out_pairs)
        ):
            known.append(trial)
            values.append(column)
    if all(trial.number != best.number for trial in known):
        return None
    share, seeds = is_share(frame.objective.metric), _seed_variance(frame, known)
    columns = PairedColumns(np.stack(values, axis=1), share=share, seeds=seeds)
    gains: dict[int, Column] = {}
    for k, trial in enumerate(known):
        initial = None if trial.held_out_pairs is None else trial.held_out_pairs.initial()
        before = None if initial is None else metric_by_pair(frame.objective.metric, initial, trial.config.loss)
        if before is not None:
            gains[k] = values[k] - before
    if not gains:
        return ComparedTrials(tuple(known), columns, {})
    of_gains = None if seeds is None else SeedVariance(seeds.of_means[list(gains)], seeds.degrees_of_freedom)
    differences = PairedColumns(np.stack(list(gains.values()), axis=1), share=share, seeds=of_gains).each(
        max(len(gains), candidate_count(frame))
    )
    numbers = [known[k].number for k in gains]
    return ComparedTrials(tuple(known), columns, dict(zip(numbers, differences, strict=True)))


def candidate_count(frame: SweepFrame) -> int:
    """Return the trials among which the winner was chosen: complete ones, and those that a pruner stopped."""
    stopped = [t for t in frame.in_state(TrialState.PRUNED) if not t.record.diverged]
    return len(frame.ranked) + len(stopped)


def _seed_variance(frame: SweepFrame, trials: Sequence[TrialFrame]) -> SeedVariance | None:
    """Return the variance between seeds, pooled over the configurations; None where none has two."""
    each = [
        [float(column.mean()) for column in _seed_columns(frame, trial, None)] if trial.record.seeds else []
        for trial in trials
    ]
    freedom = sum(len(means) - 1 for means in each if means)
    if freedom < 1:
        return None
    pooled = sum(float(np.var(means)) * len(means) for means in each if means) / freedom
    return SeedVariance(np.array([pooled / max(1, len(means)) for means in each]), freedom)


def analyze_significance(frame: SweepFrame) -> Significance | None:
    """Return the significance of the best trial; None before a complete trial keeps the sweep's requirements."""
    ranked = frame.eligible
    if not ranked:
        return None
    winner, compared = ranked[0], compared_trials(frame)
    if compared is None:
        return _unpaired(frame, ranked)
    runners_up = [(t, difference) for t in ranked[1:] if (difference := compared.difference(winner, t)) is not None]
    known = [k for k, trial in enumerate(compared.trials) if trial.record.keeps_requirements]
    drawn = (compared.columns.means + compared.columns.deviations)[:, known]
    shares = _first_place_shares(frame.sign * drawn)
    against = compared.gains.get(winner.number)
    return Significance(
        winner=winner,
        pair_count=len(compared.columns.values),
        paired=True,
        against_initial=_unpaired_gain(frame, winner) if against is None else against,
        runners_up=tuple(runners_up),
        first_place_shares={compared.trials[k].number: float(share) for k, share in zip(known, shares, strict=True)},
        not_distinguishable=(winner, *(trial for trial, difference in runners_up if not difference.is_clear)),
    )


def _first_place_shares(resampled: Column) -> Column:
    """Return how often each column is the highest, ties divided equally."""
    first = resampled >= resampled.max(axis=1, keepdims=True) - ROUNDING_TOLERANCE
    return np.mean(first / first.sum(axis=1, keepdims=True), axis=0)


def is_share(metric: str) -> bool:
    """Return whether a metric is a share of pairs or prompts, so that differences lie in [-1, 1]."""
    return base_name(metric) in _FRACTION_METRICS


def paired_difference(a: Column, b: Column, metric: str) -> Difference:
    """Return the mean of a - b by itself; `a` and `b` are values of `metric` on the same pairs, [N] each."""
    return PairedColumns((a - b)[:, None], share=is_share(metric)).each(1)[0]


def trial_values(frame: SweepFrame, trial: TrialFrame, metric: str | None = None) -> Column | None:
    """Return the metric (default: the objective) on each held-out pair after training, [N]; None without pairs.

    Of a configuration trained with several seeds: the mean over them.
    """
    values = _seed_columns(frame, trial, metric)
    return np.mean(values, axis=0) if values else None


def _seed_columns(frame: SweepFrame, trial: TrialFrame, metric: str | None) -> list[Column]:
    """Return the metric on each held-out pair, [N], of each seed."""
    if trial.held_out_pairs is None:
        return []
    same: list[HeldOutPairs] = [pairs for pairs in trial.seed_pairs if pairs.same_pairs(trial.held_out_pairs)]
    if len(same) < len(trial.seed_pairs) or len(same) < trial.record.complete_seeds:
        same = []  # some seeds lack these pairs: the best one stands for them
    each = [
        metric_by_pair(metric or frame.objective.metric, p, trial.config.loss) for p in same or [trial.held_out_pairs]
    ]
    return [column for column in each if column is not None]


def _unpaired(frame: SweepFrame, ranked: Sequence[TrialFrame]) -> Significance:
    """Compare without held-out pairs: only shares have a known variance, that of two independent samples."""
    winner, count = ranked[0], len(frame.ranked)
    tests = max(1, count * (count - 1) // 2)
    found = [(t, _unpaired_difference(frame, winner.record.value, t.record.value, tests)) for t in ranked[1:]]
    runners_up = tuple((trial, difference) for trial, difference in found if difference is not None)
    pair_count = runners_up[0][1].pair_count if runners_up else 0
    indistinguishable = (winner, *(trial for trial, difference in runners_up if not difference.is_clear))
    return Significance(winner, pair_count, False, _unpaired_gain(frame, winner), runners_up, {}, indistinguishable)


def _unpaired_gain(frame: SweepFrame, winner: TrialFrame) -> Difference | None:
    start = frame.initial_value(frame.objective.metric)
    return _unpaired_difference(frame, winner.record.value, start, candidate_count(frame))


def _unpaired_difference(frame: SweepFrame, a: float | None, b: float | None, comparisons: int) -> Difference | None:
    """Return a - b, jointly over so many comparisons by Bonferroni's rule."""
    if a is None or b is None or not is_share(frame.objective.metric):
        return None
    counts_prompts = base_name(frame.objective.metric) == "exact_answers"
    count = frame.spec.base.evaluation.prompts if counts_prompts else 0 if frame.data is None else frame.data.eval_rows
    if count < 1:
        return None
    return Difference(
        a - b,
        *share_difference(a, b, count),
        count,
        spread=math.sqrt(a * (1 - a) + b * (1 - b)),
        paired=False,
        joint=share_difference(a, b, count, comparisons) if comparisons > 1 else None,
        comparisons=comparisons,
        critical=bonferroni(comparisons),
    )


# --- which of several tied trials to use -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Measure:
    """One thing of which a trial should have little. `ratio`, `gap`: what counts as notably more than the least."""

    of: Callable[[TrialFrame], float | None]
    text: str
    show: Callable[[float], str]
    ratio: float = 1.1
    gap: float = 0.0


def recommend(
    frame: SweepFrame, significance: Significance, avoid: Container[str] = ()
) -> tuple[TrialFrame, str] | None:
    """Return which of the tied trials to use, and why: of the closest to the initial model the cheapest, then the best.

    Far from the initial model a held-out accuracy says less about the answers (Chen et al., arXiv 2405.19534).

    Args:
        frame: the sweep.
        significance: its significance.
        avoid: labels of trials that are not to be used.

    Returns:
        None where there is no tie, where all are to be avoided, with several objectives, which only a user weighs, and
        where finalists were compared, whose recommendation holds.
    """
    if frame.confirmation is not None:
        return None
    tied = [trial for trial in significance.not_distinguishable if trial.label not in avoid]
    if len(significance.not_distinguishable) < 2 or not tied or frame.further_objectives:
        return None
    left, decisive = tied, None
    distance = _DISTANCES[0 if all(_kl(trial) is not None for trial in tied) else 1]
    for measure in (distance, *_COSTS):
        known = [(value, trial) for trial in left if (value := measure.of(trial)) is not None]
        if len(known) < len(left):
            continue
        least = min(value for value, _ in known)
        left = [t for value, t in known if value <= measure.ratio * least or value - least <= measure.gap]
        if decisive is None and tied[0] not in left:
            decisive = measure
    if decisive is None:
        return tied[0], "the first of them (none is notably closer to the initial model or cheaper)"
    values = [decisive.show(decisive.of(trial) or 0.0) for trial in (left[0], tied[0])]
    return left[0], f"{decisive.text.format(values[0])} against {values[1]} of trial {tied[0].label})"


def _kl(trial: TrialFrame) -> float | None:
    return trial.last(KL)


def _log_ratio(trial: TrialFrame) -> float | None:
    """Return the size of the mean log-ratio per token of the chosen responses."""
    value = log_ratio(trial, LOG_RATIO_CHOSEN)
    return None if value is None else abs(value)


_DISTANCES = (
    _Measure(_kl, "closer to the initial model (KL per token {}", format_brief, gap=0.001),
    _Measure(_log_ratio, "closer to the initial model (log-ratio per token {}", format_brief, gap=0.01),
)
"""In nats per token."""
_COSTS = (
    _Measure(lambda trial: trial.tokens, "cheaper ({} training tokens", format_count),
    _Measure(lambda trial: trial.record.seconds, "cheaper ({}", format_duration, ratio=1.25, gap=60.0),
)
"""Hours also vary with the machine's load."""
