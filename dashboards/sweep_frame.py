"""A whole sweep as one value: what reports, diagnoses and comparisons are pure functions of."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from dashboards.frame import TrialView, show
from dashboards.pairs import HeldOut
from orchestrator.judging.verdict import Verdict
from orchestrator.spec.goal import Goal
from orchestrator.spec.space import SearchSpace
from orchestrator.spec.sweep import SweepSpec
from orchestrator.study.ranking import front, ranking
from orchestrator.study.records import Event, TrialRecord
from orchestrator.study.state import TrialState
from trainer.config import TrialConfig
from trainer.data.summary import DataReport


@dataclass(frozen=True, slots=True)
class Sample:
    """One kept answer to a fixed prompt, after `step` updates."""

    step: int
    prompt: str
    answer: str
    expected: str | None
    right: bool | None


@dataclass(frozen=True, slots=True, eq=False)
class TrialCase:
    """One trial with all that it left: its courses, its configuration, its held-out pairs, its samples."""

    view: TrialView
    config: TrialConfig
    label: str
    sweep: str
    steps: int | None = None
    """Updates of the whole trial; None where the data is not known."""
    samples: tuple[Sample, ...] = ()
    pairs: HeldOut | None = None
    failure: str = ""
    """The end of the traceback of a trial that failed."""
    judged: tuple[Verdict, ...] = ()
    """What judges said of its answers."""

    @property
    def record(self) -> TrialRecord:
        """What the study knows of it."""
        return self.view.record

    @property
    def number(self) -> int:
        """Unique in its frame."""
        return self.view.record.number

    def first(self, metric: str) -> float | None:
        """The metric at step 0: the start model's; None where it was not measured there."""
        course = self.view.courses.get(metric)
        return course[0][1] if course and course[0][0] == 0 else None

    def last(self, metric: str) -> float | None:
        """The metric's newest finite value."""
        value = self.view.last(metric)
        return value if value is not None and math.isfinite(value) else None

    def change(self, metric: str) -> float | None:
        """The newest value minus the start model's."""
        before, after = self.first(metric), self.last(metric)
        return None if before is None or after is None else after - before

    @property
    def end_word(self) -> str:
        """How it stands, in one word; a diverged trial is told from one that was pruned."""
        return "DIVERGED" if self.record.diverged else str(self.record.state)

    @property
    def tokens(self) -> float | None:
        """Tokens computed in training, from the tokens per pair of each logged update; None where none was logged."""
        per_second, pairs = (
            self.view.courses.get("tokens_per_second", []),
            self.view.courses.get("pairs_per_second", []),
        )
        rates = {step: value for step, value in pairs if value > 0 and math.isfinite(value)}
        per_pair = [(step, tokens / rates[step]) for step, tokens in per_second if step in rates]
        if not per_pair:
            return None
        total, before = 0.0, 0
        for step, tokens in per_pair:
            total += (step - before) * tokens
            before = step
        return total * self.config.training.pairs_per_update


@dataclass(frozen=True, eq=False)
class SweepFrame:
    """A sweep, or several put side by side, at one moment."""

    name: str
    description: str
    goal: Goal
    paths: tuple[str, ...]
    """Searched leaves, in the file's order."""
    space: SearchSpace
    trials: tuple[TrialCase, ...]
    spec: SweepSpec
    state: str
    """preparing, running, interrupted or finished."""
    at: float
    """When it was looked at, seconds since the epoch."""
    hours: float = 0.0
    """Working time of the sweep's drivers."""
    planned: int | None = None
    """Trials in all, where that is known."""
    data: DataReport | None = None
    events: tuple[Event, ...] = ()
    gpus: bool = False
    """Whether trials run on GPUs."""
    notices: tuple[str, ...] = ()
    """What could not be read, in words."""
    sweeps: tuple[str, ...] = ()
    """The sweeps put side by side; empty for one alone."""
    also: tuple[Goal, ...] = ()
    """Further goals, where there are several."""
    short: Mapping[str, str] = field(default_factory=dict[str, str])

    @cached_property
    def ranked(self) -> list[TrialCase]:
        """Complete trials, best first."""
        by_number = {case.number: case for case in self.trials}
        return [by_number[r.number] for r in ranking([c.record for c in self.trials], self.goal, *self.also)]

    @cached_property
    def whole(self) -> list[TrialCase]:
        """Complete trials that began from the start model, best first: those whose result is that of their params."""
        return [case for case in self.ranked if case.record.fork is None]

    @cached_property
    def front(self) -> list[TrialCase]:
        """With several goals, the Pareto front; empty with one."""
        by_number = {case.number: case for case in self.trials}
        goals = (self.goal, *self.also)
        return [by_number[r.number] for r in front([c.record for c in self.trials], goals)] if self.also else []

    @property
    def sign(self) -> float:
        """1 where more of the goal is better, -1 where less is."""
        return 1.0 if self.goal.direction == "maximize" else -1.0

    def start(self, metric: str) -> float | None:
        """The start model's value of a metric: what the first trial that measured it saw at step 0."""
        found = (case.first(metric) for case in self.trials)
        return next((value for value in found if value is not None and math.isfinite(value)), None)

    def value(self, case: TrialCase) -> float | None:
        """The goal's value of a trial, or its newest where it did not complete; None where that is not finite."""
        value = case.record.value if case.record.value is not None else case.last(self.goal.metric)
        return value if value is not None and math.isfinite(value) else None

    def in_state(self, *states: TrialState) -> list[TrialCase]:
        """The trials in these states."""
        return [case for case in self.trials if case.record.state in states]

    def words(self, case: TrialCase, paths: Sequence[str] | None = None) -> str:
        """`beta 2, gamma 0.5`: the searched leaves of a trial, and what a person gave it beyond them."""
        given: Mapping[str, Any] = case.record.params
        asked = list(dict.fromkeys([*self.paths, *given])) if paths is None else paths
        return ", ".join(f"{self.short.get(p, p)} {show(given[p])}" for p in asked if p in given)
