"""`SweepFrame`: a sweep as one value, made from the study's records and metrics.

Reports, diagnoses and comparisons are pure functions of the frame.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from dashboards.analysis.held_out_pairs import HeldOutPairs
from orchestrator.judge.judgements import Judgement
from orchestrator.spec.objectives import Objective
from orchestrator.spec.search.space import SearchSpace
from orchestrator.spec.sweep_spec import SweepSpec
from orchestrator.study.trial_records import Event, TrialRecord, TrialState, pareto_front, rank_trials
from trainer.config.trial import TrialConfig
from trainer.data.data_report import DataReport
from trainer.results import StepMetrics


@dataclass(slots=True)
class TrialCurves:
    """One trial as it is shown: its record, and the metric curves of a few metrics."""

    record: TrialRecord
    curves: dict[str, list[tuple[int, float]]] = field(default_factory=dict[str, list[tuple[int, float]]])

    def add(self, metrics: Iterable[StepMetrics]) -> None:
        """Append points; a step seen before changes nothing."""
        for step_metrics in metrics:
            for name, value in step_metrics.metrics.items():
                curve = self.curves.setdefault(name, [])
                if not curve or step_metrics.step > curve[-1][0]:
                    curve.append((step_metrics.step, value))

    def values(self, name: str) -> list[float]:
        """A metric's values in order of steps."""
        return [value for _, value in self.curves.get(name, ())]

    def last(self, name: str) -> float | None:
        """A metric's newest value."""
        curve = self.curves.get(name)
        return curve[-1][1] if curve else self.record.metrics.get(name)

    @property
    def step(self) -> int:
        """The newest update seen."""
        newest = max((curve[-1][0] for curve in self.curves.values() if curve), default=0)
        return max(newest, self.record.step)


def state_counts(records: Iterable[TrialRecord]) -> dict[str, int]:
    """How many trials stand how, in words, only those that occur; diverged ones are told from pruned ones."""
    out = dict.fromkeys([*(s.lower() for s in TrialState), "diverged"], 0)
    for record in records:
        out["diverged" if record.diverged else record.state.lower()] += 1
    return {word: count for word, count in out.items() if count}


def format_counts(found: Mapping[str, int]) -> str:
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


def format_value(value: Any) -> str:
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


def format_brief(value: float | None) -> str:
    """A measured value in three digits."""
    return "–" if value is None else format_value(float(f"{value:.3g}"))


def format_signed(value: float) -> str:
    """A change, with its sign and two digits."""
    return ("+" if value > 0 else "") + format_value(float(f"{value:.2g}"))


def format_params(params: Mapping[str, Any], paths: Sequence[str]) -> str:
    """`beta=2 gamma=0.5 learning_rate=6e-7`, only the settings that this trial has."""
    short = short_names(paths)
    return " ".join(f"{short[p]}={format_value(params[p])}" for p in paths if p in params)


@dataclass(frozen=True, slots=True)
class Sample:
    """One kept answer to a fixed prompt, after `step` updates."""

    step: int
    prompt: str
    answer: str
    expected: str | None
    right: bool | None


@dataclass(frozen=True, slots=True, eq=False)
class TrialFrame:
    """One trial with all that it left: its metric curves, its configuration, its held-out pairs, its samples."""

    curves: TrialCurves
    config: TrialConfig
    label: str
    sweep: str
    steps: int | None = None
    """Updates of the whole trial; None where the data is not known."""
    samples: tuple[Sample, ...] = ()
    pairs: HeldOutPairs | None = None
    failure: str = ""
    """The end of the traceback of a trial that failed."""
    judgements: tuple[Judgement, ...] = ()
    """What judges said of its answers."""

    @property
    def record(self) -> TrialRecord:
        """What the study knows of it."""
        return self.curves.record

    @property
    def number(self) -> int:
        """Unique in its frame."""
        return self.curves.record.number

    def first(self, metric: str) -> float | None:
        """The metric at step 0: the initial model's; None where it was not measured there."""
        curve = self.curves.curves.get(metric)
        return curve[0][1] if curve and curve[0][0] == 0 else None

    def last(self, metric: str) -> float | None:
        """The metric's newest finite value."""
        value = self.curves.last(metric)
        return value if value is not None and math.isfinite(value) else None

    def change(self, metric: str) -> float | None:
        """The newest value minus the initial model's."""
        before, after = self.first(metric), self.last(metric)
        return None if before is None or after is None else after - before

    @property
    def state_label(self) -> str:
        """How it stands, in one word; a diverged trial is told from one that was pruned."""
        return "DIVERGED" if self.record.diverged else str(self.record.state)

    @property
    def tokens(self) -> float | None:
        """Tokens computed in training, from the tokens per pair of each logged update; None where none was logged."""
        per_second, pairs = (
            self.curves.curves.get("tokens_per_second", []),
            self.curves.curves.get("pairs_per_second", []),
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
    objective: Objective
    paths: tuple[str, ...]
    """Searched settings, in the file's order."""
    space: SearchSpace
    trials: tuple[TrialFrame, ...]
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
    further_objectives: tuple[Objective, ...] = ()
    """Further objectives, where there are several."""
    short_names: Mapping[str, str] = field(default_factory=dict[str, str])

    @cached_property
    def ranked(self) -> list[TrialFrame]:
        """Complete trials, best first."""
        by_number = {trial.number: trial for trial in self.trials}
        return [
            by_number[r.number]
            for r in rank_trials([c.record for c in self.trials], self.objective, *self.further_objectives)
        ]

    @cached_property
    def comparable_trials(self) -> list[TrialFrame]:
        """Complete trials that began from the initial model, best first: those whose result is that of their params."""
        return [trial for trial in self.ranked if trial.record.fork is None]

    @cached_property
    def pareto_front(self) -> list[TrialFrame]:
        """With several objectives, the Pareto front; empty with one."""
        by_number = {trial.number: trial for trial in self.trials}
        objectives = (self.objective, *self.further_objectives)
        return (
            [by_number[r.number] for r in pareto_front([c.record for c in self.trials], objectives)]
            if self.further_objectives
            else []
        )

    @property
    def sign(self) -> float:
        """1 where more of the objective is better, -1 where less is."""
        return 1.0 if self.objective.direction == "maximize" else -1.0

    def initial_value(self, metric: str) -> float | None:
        """The initial model's value of a metric: what the first trial that measured it saw at step 0."""
        found = (trial.first(metric) for trial in self.trials)
        return next((value for value in found if value is not None and math.isfinite(value)), None)

    def value(self, trial: TrialFrame) -> float | None:
        """The objective's value of a trial, or its newest where it did not complete; None where that is not finite."""
        value = trial.record.value if trial.record.value is not None else trial.last(self.objective.metric)
        return value if value is not None and math.isfinite(value) else None

    def in_state(self, *states: TrialState) -> list[TrialFrame]:
        """The trials in these states."""
        return [trial for trial in self.trials if trial.record.state in states]

    def describe_params(self, trial: TrialFrame, paths: Sequence[str] | None = None) -> str:
        """`beta 2, gamma 0.5`: the searched settings of a trial, and what a person gave it beyond them."""
        given: Mapping[str, Any] = trial.record.params
        shown_paths = list(dict.fromkeys([*self.paths, *given])) if paths is None else paths
        return ", ".join(f"{self.short_names.get(p, p)} {format_value(given[p])}" for p in shown_paths if p in given)
