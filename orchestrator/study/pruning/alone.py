"""Pruners that look at the trial's own course: fixed bounds, and patience."""

from __future__ import annotations

import math

from orchestrator.spec.pruners import PatientPruner, ThresholdPruner
from orchestrator.study.pruning.course import Course, at_update, show


def threshold(config: ThresholdPruner, own: Course) -> str:
    """Why the trial stops; empty: it goes on."""
    warmup = at_update(config.n_warmup_steps, own.updates)
    if warmup is None or own.step < warmup:
        return ""
    if math.isnan(own.value):
        return own.reason(f"{own.goal.metric} is not a number")
    for bound, outside, side in ((config.lower, own.value.__lt__, "below"), (config.upper, own.value.__gt__, "above")):
        if bound is not None and outside(bound):
            return own.reason(f"{own.goal.metric} {show(own.value)} is {side} the bound {show(bound)}")
    return ""


def out_of_patience(config: PatientPruner, own: Course) -> str:
    """Optuna's rule: the best of the last patience + 1 evaluations is worse than before by more than min_delta.

    A value that is no number never counts as better; Optuna's never prunes for one.
    """
    values = [own.values[step] for step in sorted(own.values)]
    split = len(values) - config.patience - 1
    if split < 1:
        return ""
    sign = 1.0 if own.goal.direction == "maximize" else -1.0
    numbers = [-math.inf if math.isnan(value) else sign * value for value in values]
    before, after = max(numbers[:split]), max(numbers[split:])
    if after >= before - config.min_delta:
        return ""
    late = "no number" if math.isinf(after) else show(sign * after)
    return own.reason(
        f"the best {own.goal.metric} of the last {config.patience + 1} evaluations, {late}, is not as good as "
        f"{show(sign * before)} before them"
    )
