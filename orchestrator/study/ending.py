"""What goes into the books when a trial ends."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.spec.sweep import Goal
from orchestrator.study.state import FailureKind, Outcome, TrialState


def settle(
    outcome: Outcome, seen: Mapping[str, float], goals: Sequence[Goal]
) -> tuple[Outcome, tuple[float, ...] | None]:
    """The outcome and the goals' values to record; `seen` are the last values of every metric.

    A complete trial has a finite value of each goal, a diverged one the worst there is.
    """
    if outcome.diverged:
        # A failed trial would be invisible to the samplers, and they would come back to the same place.
        return outcome, tuple(-math.inf if goal.direction == "maximize" else math.inf for goal in goals)
    for goal in goals:
        value = seen.get(goal.metric)
        if value is not None and math.isfinite(value):
            continue
        if outcome.state is TrialState.COMPLETE:
            what = "was never reported" if value is None else f"is {value}"
            reason = f"the trial ran to its end, but its goal {goal.metric} {what}"
            return Outcome(TrialState.FAILED, reason, FailureKind.BUG), None
        return outcome, None
    return outcome, None if outcome.state is TrialState.FAILED else tuple(seen[goal.metric] for goal in goals)


def outcome_to_json(outcome: Outcome) -> dict[str, Any]:
    """An outcome as Optuna stores it."""
    failure = None if outcome.failure is None else outcome.failure.value
    return {"state": outcome.state.value, "reason": outcome.reason, "failure": failure, "diverged": outcome.diverged}
