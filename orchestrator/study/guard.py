"""The guard against divergence: when a trial is beyond saving, in words with the numbers.

A pure function of the trial's points by step: given again, or in other batches, they lead to the same verdict at the
same step. The trial ends there; what it reported after that step does not count, however early it arrived.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from orchestrator.spec.guard import GuardConfig
from orchestrator.study.guard_rules import rules
from trainer.metrics import EVAL
from trainer.report import GO_ON, Point, Verdict

ALWAYS = ("loss", "grad_norm", f"{EVAL}loss")
"""Metrics whose loss of finiteness ends a trial: nothing after it can be trusted. So does a goal's."""


def as_number(value: Any) -> float:
    """The value as a float; what is no number at all becomes NaN, never 0."""
    return float(value) if isinstance(value, (int, float)) else math.nan


def judge(config: GuardConfig, goal: str, points: Iterable[Point]) -> Verdict:
    """The verdict on a trial with these points. `goal` is the metric the sweep is ranked by."""
    guard = Guard(config, goal)
    guard.see(points)
    return guard.verdict


class Guard:
    """Watches one trial. `verdict` stays once it is to stop; `last` is the step that it was given at."""

    def __init__(self, config: GuardConfig, *goals: str) -> None:
        self._watched = dict.fromkeys((*ALWAYS, *goals))
        self._rules = rules(config)
        self._seen = -1
        self.verdict = GO_ON

    def see(self, points: Iterable[Point]) -> list[Point]:
        """Take points, in any order within the call, and return those that count: none beyond the trial's end.

        A step seen before changes nothing. Values that are no numbers come back as NaN.
        """
        counted: list[Point] = []
        for point in sorted(points, key=lambda p: p.step):
            if point.step > self._seen:
                if self.verdict.stop:
                    break
                self._seen = point.step
                if reason := self._reason(point):
                    self.verdict = Verdict(stop=True, reason=reason, diverged=True)
            numbers = {name: as_number(value) for name, value in point.metrics.items()}
            counted.append(replace(point, metrics=numbers))
        return counted

    def _reason(self, point: Point) -> str:
        if strange := _not_numbers(point.metrics):
            return f"diverged: {strange} at step {point.step} is not a number"
        for name in self._watched:
            value = point.metrics.get(name)
            if value is not None and not math.isfinite(value):
                return f"diverged: {name} is {value} at step {point.step}"
        # Each rule sees each point, also where another one has spoken.
        said = [why for rule in self._rules if (why := rule.see(point))]
        return f"diverged: {said[0]}" if said else ""


def _not_numbers(metrics: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in metrics.items() if not isinstance(value, (int, float)))
