"""`RunningTrial`: a trial that a worker of this process runs; its logged metrics, early stopping and final outcome.

`EarlyStopping` applies the divergence guard, then the pruner, in the order of the metrics. `StudyMisuse` and its
subclasses are programming errors, never the user's.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from orchestrator.spec.objectives import Objective
from orchestrator.study.pruning.divergence_guard import DivergenceGuard
from orchestrator.study.pruning.pruner import TrialPruner
from orchestrator.study.trial_records import FailureKind, Outcome, TrialState
from trainer.metrics import EVAL
from trainer.results import CONTINUE, StepMetrics, StopDecision

LOSS_METRICS = ("loss", "grad_norm", f"{EVAL}loss")
"""Metrics that change with what scales the loss."""


class EarlyStopping:
    """Watches one trial. A function of its points by step: told again, or in other batches, the decision is the same.

    `judge` gives the pruner with what the trial may know now; in a reproducible sweep that never changes.
    """

    def __init__(
        self, guard: DivergenceGuard, make_pruner: Callable[[], TrialPruner], metric: str, *, inherited: int = -1
    ) -> None:
        """`inherited`: the update up to which the points are another trial's, whom guard and pruner let pass."""
        self._guard, self._make_pruner, self._metric, self._inherited = guard, make_pruner, metric, inherited
        self._curve: dict[int, float] = {}
        self._seen = -1
        self.decision = CONTINUE

    def update(self, metrics: Iterable[StepMetrics]) -> list[StepMetrics]:
        """Take points, in any order within the call, and return those that count: none beyond the trial's end."""
        counted: list[StepMetrics] = []
        for step_metrics in sorted(metrics, key=lambda p: p.step):
            fresh = step_metrics.step > self._seen
            if fresh and self.decision.stop:
                break
            if step_metrics.step <= self._inherited:
                counted.append(self._inherit(step_metrics))
                continue
            clean = self._guard.update([step_metrics])
            counted += clean
            if fresh:
                self._seen = step_metrics.step
                self.decision = self._guard.decision
                if not self.decision.stop and clean and self._metric in clean[0].metrics:
                    self._curve[step_metrics.step] = clean[0].metrics[self._metric]
                    if reason := self._make_pruner().prune_reason(self._curve, step_metrics.step, step_metrics.pairs):
                        self.decision = StopDecision(stop=True, reason=reason)
        return counted

    def _inherit(self, step_metrics: StepMetrics) -> StepMetrics:
        """The initial model and the way so far are the other trial's; the scale of the loss may be this one's own."""
        self._guard.update(
            [replace(step_metrics, metrics={n: v for n, v in step_metrics.metrics.items() if n not in LOSS_METRICS})]
        )
        self._seen = max(self._seen, step_metrics.step)
        if self._metric in step_metrics.metrics:
            self._curve[step_metrics.step] = step_metrics.metrics[self._metric]
        return step_metrics


@dataclass(frozen=True, slots=True)
class LoggedMetrics:
    """What the study has of a trial: its steps, the last of them and the last value of every metric."""

    steps: set[int] = field(default_factory=set[int])
    step: int = 0
    last: Mapping[str, float] = field(default_factory=dict[str, float])

    def with_metrics(self, metrics: Sequence[StepMetrics]) -> LoggedMetrics:
        """With these, in order, on top. The set of steps is the same one: nobody keeps the older one."""
        last = dict(self.last)
        for step_metrics in metrics:
            last |= step_metrics.metrics
        self.steps.update(step_metrics.step for step_metrics in metrics)
        return LoggedMetrics(self.steps, max(self.step, *(step_metrics.step for step_metrics in metrics)), last)


@dataclass(slots=True)
class RunningTrial:
    """A trial this process has issued and not yet closed or released."""

    number: int
    attempt: int
    trial_id: int
    gpus: float
    early_stopping: EarlyStopping
    logged: LoggedMetrics | None = None
    """What was committed of it; None: to be read, as after a transaction that failed."""
    issued_at: float | None = None
    """By the monotonic clock, when a worker took it; None while it waits for one."""

    def begin(self) -> None:
        """A worker has it now. Called again, it changes nothing."""
        if self.issued_at is None:
            self.issued_at = time.monotonic()

    @property
    def seconds(self) -> float:
        """How long a worker has had it."""
        return 0.0 if self.issued_at is None else time.monotonic() - self.issued_at


def resolve_outcome(
    outcome: Outcome, last_metrics: Mapping[str, float], objectives: Sequence[Objective]
) -> tuple[Outcome, tuple[float, ...] | None]:
    """The outcome and the objectives' values to record; `last_metrics` are the last values of every metric.

    A complete trial has a finite value of each objective, a diverged one the worst there is.
    """
    if outcome.diverged:
        # A failed trial would be invisible to the samplers, and they would come back to the same place.
        return outcome, tuple(-math.inf if objective.direction == "maximize" else math.inf for objective in objectives)
    for objective in objectives:
        value = last_metrics.get(objective.metric)
        if value is not None and math.isfinite(value):
            continue
        if outcome.state is TrialState.COMPLETE:
            what = "was never reported" if value is None else f"is {value}"
            reason = f"the trial ran to its end, but its goal {objective.metric} {what}"
            return Outcome(TrialState.FAILED, reason, FailureKind.BUG), None
        return outcome, None
    return outcome, None if outcome.state is TrialState.FAILED else tuple(
        last_metrics[objective.metric] for objective in objectives
    )


def outcome_to_json(outcome: Outcome) -> dict[str, Any]:
    """An outcome as Optuna stores it."""
    failure = None if outcome.failure is None else outcome.failure.value
    return {"state": outcome.state.value, "reason": outcome.reason, "failure": failure, "diverged": outcome.diverged}


class StudyMisuse(Exception):
    """A call that the order of things forbids: a mistake of ours, never of the user."""


class TrialFinished(StudyMisuse):
    """A finished trial takes no more points and no other outcome."""

    def __init__(self, number: int, state: TrialState, operation: str) -> None:
        self.number, self.state = number, state
        super().__init__(f"trial {number} is {state}, which is final: {operation} refused")


class AttemptSuperseded(StudyMisuse):
    """Only the attempt that was issued last may write."""

    def __init__(self, number: int, attempt: int, current: int | None) -> None:
        self.number, self.attempt, self.held = number, attempt, current
        what = "is not issued" if current is None else f"is in attempt {current}"
        super().__init__(f"attempt {attempt} of trial {number} may not write: the trial {what}")
