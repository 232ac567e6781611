"""Pruning rules: pure functions of a trial's learning curve up to one of its evaluations.

- Threshold and patient use only the trial's own learning curve: fixed bounds, and patience.
- Median and percentile compare the trial's best value so far with the other trials' values at the same update. They
  follow Optuna's pruners, except that the initial model's evaluation (update 0) does not count: all trials share it,
  and it would be the best value of a trial that collapses.
- Wilcoxon compares the trial with the best visible one at the same update, pair by pair. It follows Optuna's pruner
  with the held-out pairs as problem instances: all trials have the same pairs, so that differences far below the
  variance between pairs are detected. It compares margins of length-normalized log-probs, which beta and gamma do not
  scale.
- Successive halving and Hyperband: Optuna's pruners store rung values and brackets in system attributes, so that
  decisions depend on the order of arrival. Here a trial's value at a rung is that of its first evaluation at or after
  the rung, its competitors are the visible trials, and its bracket depends on seed and number. The rule is the same:
  the best max(1, n // reduction_factor) of the n values at a rung continue. ASHA: Li et al. 2020, arXiv:1810.05934.
  Brackets: Hyperband, Li et al. 2018, arXiv:1603.06560.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from orchestrator.spec.objectives import Objective
from orchestrator.spec.pruners import (
    HyperbandPruner,
    MedianPruner,
    PatientPruner,
    PercentilePruner,
    SuccessiveHalvingPruner,
    ThresholdPruner,
    WilcoxonPruner,
)
from orchestrator.study.sampling.random_samplers import stable_seed
from orchestrator.study.trial_records import TrialState
from orchestrator.study.trial_snapshots import TrialSnapshot


@dataclass(frozen=True, slots=True)
class LearningCurve:
    """A trial's learning curve: its metric by update up to the current evaluation. `updates`: of its run, if known."""

    number: int
    values: Mapping[int, float]
    objective: Objective
    updates: int | None

    @property
    def step(self) -> int:
        """The update of the current evaluation."""
        return max(self.values)

    @property
    def value(self) -> float:
        """The metric at the current evaluation."""
        return self.values[self.step]

    @property
    def best(self) -> float:
        """The best value so far; NaN if no value is a number."""
        numbers = [value for value in self.values.values() if not math.isnan(value)]
        if not numbers:
            return math.nan
        return max(numbers) if self.objective.direction == "maximize" else min(numbers)

    def is_worse(self, value: float, other: float) -> bool:
        """Return whether `a` is strictly worse than `b`."""
        return value < other if self.objective.direction == "maximize" else value > other

    @property
    def worse_side(self) -> str:
        """On which side worse values are: "below" or "above"."""
        return "below" if self.objective.direction == "maximize" else "above"

    def reason(self, what: str) -> str:
        """Return the reason for pruning here as text."""
        return f"pruned at update {self.step}: {what}"


def to_updates(amount: float, updates: int | None) -> int | None:
    """Return an amount in updates; below 1 it is a share of the run. None if the run's length is unknown."""
    if amount >= 1 or amount == 0:
        return int(amount)
    return None if updates is None else max(1, math.ceil(amount * updates - 1e-9))


def format_metric(value: float) -> str:
    """Return a metric's value as text with four digits."""
    return f"{value:.4g}"


def threshold_reason(config: ThresholdPruner, own: LearningCurve) -> str:
    """Return why the trial is pruned because its metric is outside of the bounds; "" to continue."""
    warmup = to_updates(config.n_warmup_steps, own.updates)
    if warmup is None or own.step < warmup:
        return ""
    if math.isnan(own.value):
        return own.reason(f"{own.objective.metric} is not a number")
    for bound, outside, side in ((config.lower, own.value.__lt__, "below"), (config.upper, own.value.__gt__, "above")):
        if bound is not None and outside(bound):
            return own.reason(
                f"{own.objective.metric} {format_metric(own.value)} is {side} the bound {format_metric(bound)}"
            )
    return ""


def patient_reason(config: PatientPruner, own: LearningCurve) -> str:
    """Return why the trial is pruned for its last patience + 1 evaluations; "" to continue.

    Optuna's rule: the best of the last patience + 1 evaluations is worse than the best before by more than min_delta.
    NaN never counts as better here; in Optuna it prevents pruning.
    """
    values = [own.values[step] for step in sorted(own.values)]
    split = len(values) - config.patience - 1
    if split < 1:
        return ""
    sign = 1.0 if own.objective.direction == "maximize" else -1.0
    numbers = [-math.inf if math.isnan(value) else sign * value for value in values]
    before, after = max(numbers[:split]), max(numbers[split:])
    if after >= before - config.min_delta:
        return ""
    late = "no number" if math.isinf(after) else format_metric(sign * after)
    return own.reason(
        f"the best {own.objective.metric} of the last {config.patience + 1} evaluations, {late}, is not as good as "
        f"{format_metric(sign * before)} before them"
    )


def percentile_reason(
    config: MedianPruner | PercentilePruner, own: LearningCurve, others: Iterable[TrialSnapshot]
) -> str:
    """Return why the trial is pruned because its best value is worse than the percentile; "" to continue."""
    share = config.percentile if isinstance(config, PercentilePruner) else 50.0
    warmup = to_updates(config.n_warmup_steps, own.updates)
    complete = [trial for trial in others if trial.state is TrialState.COMPLETE]
    if warmup is None or own.step < warmup or len(complete) < config.n_startup_trials:
        return ""
    if math.isnan(own.best):
        return own.reason(f"{own.objective.metric} is not a number")
    values = [trial.curve[own.step] for trial in complete if own.step in trial.curve]
    values = [value for value in values if not math.isnan(value)]
    if len(values) < config.n_min_trials or not values:
        return ""
    limit = float(np.percentile(values, 100 - share if own.objective.direction == "maximize" else share))
    if not own.is_worse(own.best, limit):
        return ""
    name = "median" if isinstance(config, MedianPruner) else f"best {share:g}% mark"
    best = f"{own.objective.metric} {format_metric(own.value)}"
    if own.best != own.value:
        best += f" (best so far {format_metric(own.best)})"
    return own.reason(f"{best} is {own.worse_side} the {name} {format_metric(limit)} of {len(values)} trials")


def best_complete_trial(others: Iterable[TrialSnapshot], objective: Objective) -> TrialSnapshot | None:
    """Return the complete trial with the best value of the sweep's first objective; None without one."""
    sign = -1.0 if objective.direction == "maximize" else 1.0
    done = [
        (sign * trial.values[0], trial.number, trial)
        for trial in others
        if trial.state is TrialState.COMPLETE and trial.values is not None and math.isfinite(trial.values[0])
    ]
    return min(done, key=lambda row: row[:2])[2] if done else None


def wilcoxon_reason(
    config: WilcoxonPruner, own: LearningCurve, own_margins: Sequence[float], best: int, best_margins: Sequence[float]
) -> str:
    """Return why the trial is pruned because it is worse than trial `best` by a signed-rank test; "" to continue.

    `own_margins` and `best_margins` are the margins of the same pairs at the same update.
    """
    from scipy.stats import wilcoxon as signed_rank

    warmup = to_updates(config.n_warmup_steps, own.updates)
    if warmup is None or own.step < warmup or len(own_margins) != len(best_margins) or not own_margins:
        return ""
    if any(math.isnan(value) for value in own_margins):
        return own.reason(f"{own.objective.metric} is not a number")
    differences = [own_margin - best_margin for own_margin, best_margin in zip(own_margins, best_margins, strict=True)]
    if not any(differences) or sum(differences) >= 0:
        return ""
    tested: Any = signed_rank(differences, alternative="less", zero_method="zsplit")
    p_value = float(tested.pvalue)
    if p_value >= config.p_threshold:
        return ""
    lower = sum(difference < 0 for difference in differences)
    return own.reason(
        f"worse than trial {best} pair by pair: a smaller margin of log-probs on {lower} of {len(differences)} "
        f"held-out pairs (signed-rank test, p = {p_value:.2g} below {config.p_threshold:g})"
    )


Rungs = Sequence[float]


def successive_halving_reason(
    config: SuccessiveHalvingPruner, own: LearningCurve, others: Iterable[TrialSnapshot]
) -> str:
    """Return why the trial is pruned at a rung; "" to continue."""
    rungs = config.rungs or rung_steps(config.min_resource, config.reduction_factor, own.updates)
    return _halving_reason(own, lambda: others, rungs, config.reduction_factor, "")


def hyperband_reason(config: HyperbandPruner, own: LearningCurve, others: Iterable[TrialSnapshot], seed: int) -> str:
    """Return why the trial is pruned at a rung of its bracket; "" to continue. Bracket b skips the first b rungs."""
    rungs = rung_steps(config.min_resource, config.reduction_factor, own.updates)
    brackets = len(rungs) + 1
    bracket = choose_bracket(own.number, brackets, config.reduction_factor, seed)

    def same_bracket() -> list[TrialSnapshot]:
        return [
            trial
            for trial in others
            if choose_bracket(trial.number, brackets, config.reduction_factor, seed) == bracket
        ]

    return _halving_reason(own, same_bracket, rungs[bracket:], config.reduction_factor, f" in bracket {bracket}")


def rung_steps(least: float, factor: int, updates: int | None) -> list[float]:
    """Return the rungs least, least * factor, ... below the end of the run; empty if its length is unknown."""
    run_length = 1.0 if least < 1 else updates
    if run_length is None:
        return []
    count = math.floor(math.log(run_length / least, factor) + 1e-9) if run_length > least else 0
    return [least * factor**index for index in range(count)]


def choose_bracket(number: int, brackets: int, factor: int, seed: int) -> int:
    """Return the trial's bracket, drawn by Hyperband's shares: a bracket with more rungs gets more trials."""
    shares = [math.ceil(brackets * factor**more / (more + 1)) for more in reversed(range(brackets))]
    position = stable_seed(seed, number) % sum(shares)
    for bracket, share in enumerate(shares):
        if position < share:
            return bracket
        position -= share
    raise AssertionError("a position below the sum is in one of the shares")


def at_rung(curve: Mapping[int, float], rung: int) -> tuple[int, float] | None:
    """Return update and value of the first evaluation at or after the rung; None if there is none."""
    step = min((update for update in curve if update >= rung), default=None)
    return None if step is None else (step, curve[step])


def _halving_reason(
    own: LearningCurve, others: Callable[[], Iterable[TrialSnapshot]], rungs: Rungs, factor: int, where: str
) -> str:
    for amount in rungs:
        rung = to_updates(amount, own.updates)
        reached = None if rung is None else at_rung(own.values, rung)
        if reached is None or reached[0] != own.step:
            continue  # the rung is not reached yet, or was decided at an earlier evaluation
        if math.isnan(own.value):
            return own.reason(f"{own.objective.metric} is not a number")
        competitors = [value for trial in others() if (value := _value_at_rung(trial, amount)) is not None]
        better = sum(own.is_worse(own.value, value) for value in competitors)
        count = len(competitors) + 1
        survivors = max(1, count // factor)
        if better >= survivors:
            rank = f"{own.objective.metric} {format_metric(own.value)} is number {better + 1} of {count}{where}"
            text = "the best one continues" if survivors == 1 else f"the best {survivors} continue"
            return own.reason(f"{rank} at the rung of {rung} updates, where {text}")
    return ""


def _value_at_rung(trial: TrialSnapshot, amount: float) -> float | None:
    """A competitor's value at the rung; None if it did not reach the rung or the value is NaN."""
    rung = to_updates(amount, trial.updates)
    found = None if rung is None else at_rung(trial.curve, rung)
    return None if found is None or math.isnan(found[1]) else found[1]
