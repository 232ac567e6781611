"""A whole sweep as one value: what reports, diagnoses and comparisons are pure functions of.

What every way of looking shares: a sweep as one tidy value, made from the study's records and points.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from dashboards.analysis.held_out_pairs import HeldOut
from orchestrator.judge.judgements import Verdict
from orchestrator.spec.objectives import Goal
from orchestrator.spec.search.space import SearchSpace
from orchestrator.spec.sweep_spec import SweepSpec
from orchestrator.study.trial_records import Event, TrialRecord, TrialState, front, ranking
from trainer.config.trial import TrialConfig
from trainer.data.data_report import DataReport
from trainer.results import Point


@dataclass(slots=True)
class TrialView:
    """One trial as it is shown: its record, and the courses of a few metrics."""

    record: TrialRecord
    courses: dict[str, list[tuple[int, float]]] = field(default_factory=dict[str, list[tuple[int, float]]])

    def add(self, points: Iterable[Point]) -> None:
        """Append points; a step seen before changes nothing."""
        for point in points:
            for name, value in point.metrics.items():
                course = self.courses.setdefault(name, [])
                if not course or point.step > course[-1][0]:
                    course.append((point.step, value))

    def values(self, name: str) -> list[float]:
        """A metric's values in order of steps."""
        return [value for _, value in self.courses.get(name, ())]

    def last(self, name: str) -> float | None:
        """A metric's newest value."""
        course = self.courses.get(name)
        return course[-1][1] if course else self.record.metrics.get(name)

    @property
    def step(self) -> int:
        """The newest update seen."""
        newest = max((course[-1][0] for course in self.courses.values() if course), default=0)
        return max(newest, self.record.step)


def endings(records: Iterable[TrialRecord]) -> dict[str, int]:
    """How many trials stand how, in words, only those that occur; diverged ones are told from pruned ones."""
    out = dict.fromkeys([*(s.lower() for s in TrialState), "diverged"], 0)
    for record in records:
        out["diverged" if record.diverged else record.state.lower()] += 1
    return {word: count for word, count in out.items() if count}


def told(found: Mapping[str, int]) -> str:
    """`9 complete, 1 pruned`."""
    return ", ".join(f"{count} {word}" for word, count in found.items())


def short_names(paths: Sequence[str]) -> dict[str, str]:
    """The shortest endings that tell the paths apart: loss.beta -> beta."""
    out: dict[str, str] = {}
    for path in paths:
        parts = path.split(".")
        for k in range(1, len(parts) + 1):
            tail = ".".join(parts[-k:])
            if sum(p == tail or p.endswith("." + tail) for p in paths) == 1:
                out[path] = tail
                break
        else:
            out[path] = path
    return out


def show(value: Any) -> str:
    """A hyperparameter or metric in few characters: 6e-07, 0.7312, sigmoid."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int):
        return str(value)
    if not math.isfinite(value):
        return str(value)
    if value and (abs(value) < 1e-3 or abs(value) >= 1e5):
        mantissa, exponent = f"{value:.3e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return f"{value:.4g}"


def brief(value: float | None) -> str:
    """A measured value in three digits."""
    return "–" if value is None else show(float(f"{value:.3g}"))


def signed(value: float) -> str:
    """A change, with its sign and two digits."""
    return ("+" if value > 0 else "") + show(float(f"{value:.2g}"))


def show_params(params: Mapping[str, Any], paths: Sequence[str]) -> str:
    """`beta=2 gamma=0.5 learning_rate=6e-7`, only the leaves that this trial has."""
    short = short_names(paths)
    return " ".join(f"{short[p]}={show(params[p])}" for p in paths if p in params)


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
