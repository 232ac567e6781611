"""What a sweep has spent of its budget, and whether that ends it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from orchestrator.spec.sweep import Budget, Goal


@dataclass(frozen=True, slots=True)
class Spent:
    """Of all drivers and all attempts so far."""

    hours: float
    """Wall-clock of the drivers, by the monotonic clock; time in which the whole sweep was paused is left out."""
    gpu_hours: float
    """GPUs of each attempt's slot times its hours; where there are no GPUs, slot-hours."""


def overspent(budget: Budget, spent: Spent) -> str:
    """Which part of the budget of time is used up, in words; empty while none is."""
    if budget.hours is not None and spent.hours >= budget.hours:
        return f"{spent.hours:.3g} of {budget.hours:g} hours spent"
    if budget.gpu_hours is not None and spent.gpu_hours >= budget.gpu_hours:
        return f"{spent.gpu_hours:.3g} of {budget.gpu_hours:g} gpu_hours spent"
    return ""


def reached(budget: Budget, goal: Goal, value: float | None) -> bool:
    """Whether a complete trial with this value of the goal is what the sweep was looking for."""
    if budget.target is None or value is None or not math.isfinite(value):
        return False
    return value >= budget.target if goal.direction == "maximize" else value <= budget.target
