"""Pruning rules as pure functions of `LearningCurve`, a trial's metrics seen at one of its evaluations.

- Threshold and patient look at the trial's own curve: fixed bounds, and patience.
- Median and percentile compare the trial's best value so far with the others' values at the same update. As Optuna's
  pruners of these names, except that the initial model's evaluation (update 0) does not count: every trial has it, and
  a collapsing trial would survive on it.
- Wilcoxon compares the trial with the best visible one, held-out pair by held-out pair, at the same update. As Optuna's
  pruner of this name with the held-out pairs as problem instances: every trial sees the same pairs, so that a
  difference far below the noise between pairs shows. Compared are margins of length-averaged log-probs, which neither
  beta nor gamma scales.
- Successive halving and Hyperband: Optuna's pruners of these names keep rung values and brackets in system attributes
  and decide by who came first. Here a trial's value at a rung is read from its learning curve (its first evaluation at
  or after the rung), the competitors are the visible trials, and the bracket follows from seed and number. The rule is
  the same: at a rung the best max(1, n // reduction_factor) of the n values, its own included, continue. ASHA: Li et
  al. 2020, arXiv:1810.05934. Brackets: Hyperband, Li et al. 2018, arXiv:1603.06560.
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
    """A trial's metric by update, up to the evaluation at which it is judged. `updates`: of its whole run, if known."""

    number: int
    values: Mapping[int, float]
    objective: Objective
    updates: int | None

    @property
    def step(self) -> int:
        """The evaluation at which it is judged."""
        return max(self.values)

    @property
    def value(self) -> float:
        """The metric there."""
        return self.values[self.step]

    @property
    def best(self) -> float:
        """The best value so far; NaN where no value is a number."""
        seen = [value for value in self.values.values() if not math.isnan(value)]
        if not seen:
            return math.nan
        return max(seen) if self.objective.direction == "maximize" else min(seen)

    def is_worse(self, a: float, b: float) -> bool:
        """Whether `a` is strictly worse than `b`."""
        return a < b if self.objective.direction == "maximize" else a > b

    @property
    def worse_side(self) -> str:
        """The word for a worse value."""
        return "below" if self.objective.direction == "maximize" else "above"

    def reason(self, what: str) -> str:
        """The sentence of a decision."""
        return f"pruned at update {self.step}: {what}"


def to_updates(amount: float, updates: int | None) -> int | None:
    """An amount as a number of updates: whole numbers are, below 1 it is a share of the run. None: length unknown."""
    if amount >= 1 or amount == 0:
        return int(amount)
    return None if updates is None else max(1, math.ceil(amount * updates - 1e-9))


def format_metric(value: float) -> str:
    """A metric in a sentence."""
    return f"{value:.4g}"


def threshold(config: ThresholdPruner, own: LearningCurve) -> str:
    """Why the trial stops; empty: it goes on."""
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


def patient(config: PatientPruner, own: LearningCurve) -> str:
    """Optuna's rule: the best of the last patience + 1 evaluations is worse than before by more than min_delta.

    A value that is no number never counts as better; Optuna's never prunes for one.
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


def percentile(config: MedianPruner | PercentilePruner, own: LearningCurve, others: Iterable[TrialSnapshot]) -> str:
    """Why the trial stops; empty: it goes on."""
    share = config.percentile if isinstance(config, PercentilePruner) else 50.0
    warmup = to_updates(config.n_warmup_steps, own.updates)
    complete = [trial for trial in others if trial.state is TrialState.COMPLETE]
    if warmup is None or own.step < warmup or len(complete) < config.n_startup_trials:
        return ""
    if math.isnan(own.best):
        return own.reason(f"{own.objective.metric} is not a number")
    there = [trial.curve[own.step] for trial in complete if own.step in trial.curve]
    there = [value for value in there if not math.isnan(value)]
    if len(there) < config.n_min_trials or not there:
        return ""
    bar = float(np.percentile(there, 100 - share if own.objective.direction == "maximize" else share))
    if not own.is_worse(own.best, bar):
        return ""
    name = "median" if isinstance(config, MedianPruner) else f"best {share:g}% mark"
    best = f"{own.objective.metric} {format_metric(own.value)}"
    if own.best != own.value:
        best += f" (best so far {format_metric(own.best)})"
    return own.reason(f"{best} is {own.worse_side} the {name} {format_metric(bar)} of {len(there)} trials")


def best_complete_trial(others: Iterable[TrialSnapshot], objective: Objective) -> TrialSnapshot | None:
    """The complete trial with the best value of the sweep's first objective."""
    sign = -1.0 if objective.direction == "maximize" else 1.0
    done = [
        (sign * t.values[0], t.number, t)
        for t in others
        if t.state is TrialState.COMPLETE and t.values is not None and math.isfinite(t.values[0])
    ]
    return min(done, key=lambda row: row[:2])[2] if done else None


def wilcoxon(
    config: WilcoxonPruner, own: LearningCurve, own_margins: Sequence[float], best: int, theirs: Sequence[float]
) -> str:
    """Return why the trial stops; empty if it continues.

    `own_margins` and `theirs` are the margins of the same pairs at the same update.
    """
    from scipy.stats import wilcoxon as signed_rank

    warmup = to_updates(config.n_warmup_steps, own.updates)
    if warmup is None or own.step < warmup or len(own_margins) != len(theirs) or not own_margins:
        return ""
    if any(math.isnan(value) for value in own_margins):
        return own.reason(f"{own.objective.metric} is not a number")
    differences = [a - b for a, b in zip(own_margins, theirs, strict=True)]
    if not any(differences) or sum(differences) >= 0:
        return ""
    tested: Any = signed_rank(differences, alternative="less", zero_method="zsplit")
    p = float(tested.pvalue)
    if p >= config.p_threshold:
        return ""
    lower = sum(d < 0 for d in differences)
    return own.reason(
        f"worse than trial {best} pair by pair: a smaller gap of log-probs on {lower} of {len(differences)} held-out "
        f"pairs (signed-rank test, p = {p:.2g} below {config.p_threshold:g})"
    )


Amounts = Sequence[float]


def successive_halving(config: SuccessiveHalvingPruner, own: LearningCurve, others: Iterable[TrialSnapshot]) -> str:
    """Why the trial stops; empty: it goes on."""
    rungs = config.rungs or rung_steps(config.min_resource, config.reduction_factor, own.updates)
    return _halving_reason(own, lambda: others, rungs, config.reduction_factor, "")


def hyperband(config: HyperbandPruner, own: LearningCurve, others: Iterable[TrialSnapshot], seed: int) -> str:
    """Successive halving among the trials of the same bracket; bracket b skips the first b rungs."""
    rungs = rung_steps(config.min_resource, config.reduction_factor, own.updates)
    brackets = len(rungs) + 1
    own_margins = choose_bracket(own.number, brackets, config.reduction_factor, seed)

    def same() -> list[TrialSnapshot]:
        return [t for t in others if choose_bracket(t.number, brackets, config.reduction_factor, seed) == own_margins]

    return _halving_reason(own, same, rungs[own_margins:], config.reduction_factor, f" in bracket {own_margins}")


def rung_steps(least: float, factor: int, updates: int | None) -> list[float]:
    """least, least * factor, ...: all but the last that fits into the run, which is its end."""
    run_length = 1.0 if least < 1 else updates
    if run_length is None:
        return []
    count = math.floor(math.log(run_length / least, factor) + 1e-9) if run_length > least else 0
    return [least * factor**k for k in range(count)]


def choose_bracket(number: int, brackets: int, factor: int, seed: int) -> int:
    """The trial's bracket, drawn by Hyperband's shares: the more rungs a bracket has, the more trials it gets."""
    shares = [math.ceil(brackets * factor**more / (more + 1)) for more in reversed(range(brackets))]
    position = stable_seed(seed, number) % sum(shares)
    for own_margins, share in enumerate(shares):
        if position < share:
            return own_margins
        position -= share
    raise AssertionError("a place below the sum lies in a share")


def at_rung(curve: Mapping[int, float], rung: int) -> tuple[int, float] | None:
    """The first evaluation at or after the rung."""
    step = min((s for s in curve if s >= rung), default=None)
    return None if step is None else (step, curve[step])


def _halving_reason(
    own: LearningCurve, others: Callable[[], Iterable[TrialSnapshot]], rungs: Amounts, factor: int, where: str
) -> str:
    for amount in rungs:
        rung = to_updates(amount, own.updates)
        reached = None if rung is None else at_rung(own.values, rung)
        if reached is None or reached[0] != own.step:
            continue  # not there yet, or judged there before
        if math.isnan(own.value):
            return own.reason(f"{own.objective.metric} is not a number")
        theirs = [value for trial in others() if (value := _value_at_rung(trial, amount)) is not None]
        better = sum(own.is_worse(own.value, value) for value in theirs)
        count = len(theirs) + 1
        go_on = max(1, count // factor)
        if better >= go_on:
            position = f"{own.objective.metric} {format_metric(own.value)} is number {better + 1} of {count}{where}"
            on = "the best one goes on" if go_on == 1 else f"the best {go_on} go on"
            return own.reason(f"{position} at the rung of {rung} updates, where {on}")
    return ""


def _value_at_rung(trial: TrialSnapshot, amount: float) -> float | None:
    """What a competitor had at the rung; None where it did not get there, or with a value that is no number."""
    rung = to_updates(amount, trial.updates)
    found = None if rung is None else at_rung(trial.curve, rung)
    return None if found is None or math.isnan(found[1]) else found[1]
