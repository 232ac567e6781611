"""`RunningTrial`: a trial that a worker of this process runs; its logged metrics and final outcome.

`StudyMisuse` and its subclasses are programming errors, never the user's.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from orchestrator.spec.objectives import Objective
from orchestrator.study.pruning.early_stopping import EarlyStopping
from orchestrator.study.trial_records import FailureKind, Outcome, TrialState
from trainer.results import StepMetrics


@dataclass(frozen=True, slots=True)
class LoggedMetrics:
    """The stored metrics of a trial: its steps, the last step and the last value of every metric."""

    steps: set[int] = field(default_factory=set[int])
    step: int = 0
    last: Mapping[str, float] = field(default_factory=dict[str, float])

    def with_metrics(self, metrics: Sequence[StepMetrics]) -> LoggedMetrics:
        """Return the state after these metrics, which are ordered by step.

        The returned object shares (and this call extends) `self.steps`.
        """
        last = dict(self.last)
        for step_metrics in metrics:
            last |= step_metrics.metrics
        self.steps.update(step_metrics.step for step_metrics in metrics)
        return LoggedMetrics(self.steps, max(self.step, *(step_metrics.step for step_metrics in metrics)), last)


@dataclass(slots=True)
class RunningTrial:
    """A trial that this process has issued and not yet ended or released."""

    number: int
    attempt: int
    trial_id: int
    gpus: float
    early_stopping: EarlyStopping
    logged: LoggedMetrics | None = None
    """Its stored metrics; None: read them from the database, as after a failed transaction."""
    started_at: float | None = None
    """When a worker started it, by the monotonic clock in seconds; None while it waits for one."""

    def mark_started(self) -> None:
        """Record that a worker started the trial. Later calls change nothing."""
        if self.started_at is None:
            self.started_at = time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds since a worker started the trial."""
        return 0.0 if self.started_at is None else time.monotonic() - self.started_at


def resolve_outcome(
    outcome: Outcome, last_metrics: Mapping[str, float], objectives: Sequence[Objective]
) -> tuple[Outcome, tuple[float, ...] | None]:
    """Return the outcome to record and the objectives' values; `last_metrics`: the last value of every metric.

    A complete trial needs a finite value of each objective, else it fails; a diverged one gets infinitely bad values.
    """
    if outcome.diverged:
        # Samplers ignore failed trials and would propose the same configuration again.
        return outcome, tuple(-math.inf if objective.direction == "maximize" else math.inf for objective in objectives)
    for objective in objectives:
        value = last_metrics.get(objective.metric)
        if value is not None and math.isfinite(value):
            continue
        if outcome.state is TrialState.COMPLETE:
            what = "was never reported" if value is None else f"is {value}"
            reason = f"the trial ran to its end, but its objective {objective.metric} {what}"
            return Outcome(TrialState.FAILED, reason, FailureKind.BUG), None
        return outcome, None
    return outcome, None if outcome.state is TrialState.FAILED else tuple(
        last_metrics[objective.metric] for objective in objectives
    )


def outcome_to_json(outcome: Outcome) -> dict[str, Any]:
    """Return an outcome as JSON values for Optuna's trial attributes."""
    failure = None if outcome.failure is None else outcome.failure.value
    return {"state": outcome.state.value, "reason": outcome.reason, "failure": failure, "diverged": outcome.diverged}


class StudyMisuse(Exception):
    """The study was called in a way that its state forbids: a programming error, never the user's."""


class TrialFinished(StudyMisuse):
    """The trial is finished: it takes no more metrics and no other outcome."""

    def __init__(self, number: int, state: TrialState, operation: str) -> None:
        self.number, self.state = number, state
        super().__init__(f"trial {number} is {state}, which is final: {operation} refused")


class AttemptSuperseded(StudyMisuse):
    """A later attempt at the trial was issued; only the last one may write."""

    def __init__(self, number: int, attempt: int, current: int | None) -> None:
        self.number, self.attempt, self.current = number, attempt, current
        what = "is not issued" if current is None else f"is in attempt {current}"
        super().__init__(f"attempt {attempt} of trial {number} may not write: the trial {what}")
