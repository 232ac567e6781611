"""A trial in the hands of a worker of this process.

What stops a running trial, in the order of its points: the guard, then the pruner.

What goes into the books when a trial ends.

Calls that the study refuses because they are programming errors, never the user's.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from orchestrator.spec.sweep_spec import Goal
from orchestrator.study.pruning.divergence_guard import Guard
from orchestrator.study.pruning.pruner import Judge
from orchestrator.study.trial_records import FailureKind, Outcome, TrialState
from trainer.metrics import EVAL
from trainer.results import GO_ON, Point, Verdict

OF_THE_LOSS = ("loss", "grad_norm", f"{EVAL}loss")
"""Metrics that change with what scales the loss."""


class Watch:
    """Watches one trial. A function of its points by step: told again, or in other batches, the verdict is the same.

    `judge` gives the pruner with what the trial may know now; in a reproducible sweep that never changes.
    """

    def __init__(self, guard: Guard, judge: Callable[[], Judge], metric: str, *, inherited: int = -1) -> None:
        """`inherited`: the update up to which the points are another trial's, whom guard and pruner let pass."""
        self._guard, self._judge, self._metric, self._inherited = guard, judge, metric, inherited
        self._course: dict[int, float] = {}
        self._seen = -1
        self.verdict = GO_ON

    def see(self, points: Iterable[Point]) -> list[Point]:
        """Take points, in any order within the call, and return those that count: none beyond the trial's end."""
        counted: list[Point] = []
        for point in sorted(points, key=lambda p: p.step):
            fresh = point.step > self._seen
            if fresh and self.verdict.stop:
                break
            if point.step <= self._inherited:
                counted.append(self._inherit(point))
                continue
            clean = self._guard.see([point])
            counted += clean
            if fresh:
                self._seen = point.step
                self.verdict = self._guard.verdict
                if not self.verdict.stop and clean and self._metric in clean[0].metrics:
                    self._course[point.step] = clean[0].metrics[self._metric]
                    if reason := self._judge().reason(self._course, point.step, point.pairs):
                        self.verdict = Verdict(stop=True, reason=reason)
        return counted

    def _inherit(self, point: Point) -> Point:
        """The start model and the way so far are the other trial's; the scale of the loss may be this one's own."""
        self._guard.see([replace(point, metrics={n: v for n, v in point.metrics.items() if n not in OF_THE_LOSS})])
        self._seen = max(self._seen, point.step)
        if self._metric in point.metrics:
            self._course[point.step] = point.metrics[self._metric]
        return point


@dataclass(frozen=True, slots=True)
class Told:
    """What the study has of a trial: its steps, the last of them and the last value of every metric."""

    steps: set[int] = field(default_factory=set[int])
    step: int = 0
    last: Mapping[str, float] = field(default_factory=dict[str, float])

    def after(self, points: Sequence[Point]) -> Told:
        """With these, in order, on top. The set of steps is the same one: nobody keeps the older one."""
        last = dict(self.last)
        for point in points:
            last |= point.metrics
        self.steps.update(point.step for point in points)
        return Told(self.steps, max(self.step, *(point.step for point in points)), last)


@dataclass(slots=True)
class Held:
    """A trial this process has issued and not yet closed or released."""

    number: int
    attempt: int
    trial_id: int
    gpus: float
    watch: Watch
    told: Told | None = None
    """What was committed of it; None: to be read, as after a transaction that failed."""
    since: float | None = None
    """By the monotonic clock, when a worker took it; None while it waits for one."""

    def begin(self) -> None:
        """A worker has it now. Called again, it changes nothing."""
        if self.since is None:
            self.since = time.monotonic()

    @property
    def seconds(self) -> float:
        """How long a worker has had it."""
        return 0.0 if self.since is None else time.monotonic() - self.since


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


class StudyMisuse(Exception):
    """A call that the order of things forbids: a mistake of ours, never of the user."""


class TrialFinished(StudyMisuse):
    """A finished trial takes no more points and no other outcome."""

    def __init__(self, number: int, state: TrialState, asked: str) -> None:
        self.number, self.state = number, state
        super().__init__(f"trial {number} is {state}, which is final: {asked} refused")


class NotHeld(StudyMisuse):
    """Only the attempt that was issued last may write."""

    def __init__(self, number: int, attempt: int, held: int | None) -> None:
        self.number, self.attempt, self.held = number, attempt, held
        what = "is not issued" if held is None else f"is in attempt {held}"
        super().__init__(f"attempt {attempt} of trial {number} may not write: the trial {what}")
