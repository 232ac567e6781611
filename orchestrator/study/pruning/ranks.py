"""Median and percentile: the trial's best value so far against the others' values at the same update.

The rule of Optuna's pruners of these names, except that the start model's evaluation (update 0) does not count: every
trial has it, and a collapsing trial would live on it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from orchestrator.spec.pruners import MedianPruner, PercentilePruner
from orchestrator.study.knowing import Known
from orchestrator.study.pruning.course import Course, at_update, show
from orchestrator.study.state import TrialState


def percentile(config: MedianPruner | PercentilePruner, own: Course, others: Iterable[Known]) -> str:
    """Why the trial stops; empty: it goes on."""
    share = config.percentile if isinstance(config, PercentilePruner) else 50.0
    warmup = at_update(config.n_warmup_steps, own.updates)
    complete = [trial for trial in others if trial.state is TrialState.COMPLETE]
    if warmup is None or own.step < warmup or len(complete) < config.n_startup_trials:
        return ""
    if math.isnan(own.best):
        return own.reason(f"{own.goal.metric} is not a number")
    there = [trial.course[own.step] for trial in complete if own.step in trial.course]
    there = [value for value in there if not math.isnan(value)]
    if len(there) < config.n_min_trials or not there:
        return ""
    bar = float(np.percentile(there, 100 - share if own.goal.direction == "maximize" else share))
    if not own.is_worse(own.best, bar):
        return ""
    name = "median" if isinstance(config, MedianPruner) else f"best {share:g}% mark"
    best = f"{own.goal.metric} {show(own.value)}"
    if own.best != own.value:
        best += f" (best so far {show(own.best)})"
    return own.reason(f"{best} is {own.worse_side} the {name} {show(bar)} of {len(there)} trials")
