"""What goes into the books when a trial ends."""

from __future__ import annotations

import math
from typing import Any

from orchestrator.spec.sweep import Goal
from orchestrator.study.state import FailureKind, Outcome, TrialState


def settle(outcome: Outcome, value: float | None, goal: Goal) -> tuple[Outcome, float | None]:
    """The outcome and the value to record: a complete trial has a finite value, a diverged one the worst there is."""
    finite = value is not None and math.isfinite(value)
    if outcome.state is TrialState.COMPLETE and not finite:
        what = "was never reported" if value is None else f"is {value}"
        reason = f"the trial ran to its end, but its goal {goal.metric} {what}"
        return Outcome(TrialState.FAILED, reason, FailureKind.BUG), None
    if outcome.diverged:
        # A failed trial would be invisible to the samplers, and they would come back to the same place.
        return outcome, -math.inf if goal.direction == "maximize" else math.inf
    return outcome, value if finite and outcome.state is not TrialState.FAILED else None


def outcome_to_json(outcome: Outcome) -> dict[str, Any]:
    """An outcome as Optuna stores it."""
    failure = None if outcome.failure is None else outcome.failure.value
    return {"state": outcome.state.value, "reason": outcome.reason, "failure": failure, "diverged": outcome.diverged}
