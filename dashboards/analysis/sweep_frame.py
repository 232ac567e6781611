"""`SweepFrame`: one sweep as an immutable value, loaded from the study's records and metrics.

Reports, diagnoses and comparisons are pure functions of the frame.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from dashboards.analysis.held_out_pairs import HeldOutPairs
from dashboards.formatting import format_value
from orchestrator.judge.judgements import Judgement
from orchestrator.spec.objectives import Objective
from orchestrator.spec.requirements import describe_break, find_violations
from orchestrator.spec.search.space import SearchSpace
from orchestrator.spec.sweep_spec import SweepSpec
from orchestrator.study.confirmation import Confirmation
from orchestrator.study.repeats import first_number
from orchestrator.study.trial_records import (
    Event,
    TrialRecord,
    TrialState,
    pareto_front,
    rank_trials,
    requirements_text,
)
from trainer.config.trial import TrialConfig
from trainer.data.data_report import DataReport
from trainer.results import StepMetrics


@dataclass(slots=True)
class TrialCurves:
    """One trial's record and learning curves: metric -> [(step, value), ...]."""

    record: TrialRecord
    curves: dict[str, list[tuple[int, float]]] = field(default_factory=dict[str, list[tuple[int, float]]])
    idle_word: str = ""
    """Shown for a RUNNING trial on which no worker works: WAITING for one, or INTERRUPTED with its driver."""

    def add(self, metrics: Iterable[StepMetrics]) -> None:
        """Append metrics; steps not newer than the last one are ignored."""
        for step_metrics in metrics:
            for name, value in step_metrics.metrics.items():
                curve = self.curves.setdefault(name, [])
                if not curve or step_metrics.step > curve[-1][0]:
                    curve.append((step_metrics.step, value))

    def values(self, name: str) -> list[float]:
        """Return a metric's values in order of steps."""
        return [value for _, value in self.curves.get(name, ())]

    def last(self, name: str) -> float | None:
        """Return a metric's newest value; None where it was never logged."""
        curve = self.curves.get(name)
        return curve[-1][1] if curve else self.record.metrics.get(name)

    @property
    def last_update(self) -> int:
        """Newest update with metrics."""
        newest = max((curve[-1][0] for curve in self.curves.values() if curve), default=0)
        return max(newest, self.record.step)


def state_counts(records: Iterable[TrialRecord]) -> dict[str, int]:
    """Return the number of trials by state, without zeros; diverged trials are counted apart from pruned ones."""
    out = dict.fromkeys([*(s.lower() for s in TrialState), "diverged"], 0)
    for record in records:
        out["diverged" if record.diverged else record.state.lower()] += 1
    return {word: count for word, count in out.items() if count}


@dataclass(frozen=True, slots=True)
class Sample:
    """One stored completion of a fixed prompt, after `step` updates."""

    step: int
    prompt: str
    answer: str
    expected: str | None
    right: bool | None


@dataclass(frozen=True, slots=True, eq=False)
class TrialFrame:
    """One trial: its metric curves, configuration, held-out pairs, samples and judgements."""

    curves: TrialCurves
    config: TrialConfig
    label: str
    sweep: str
    planned_updates: int | None = None
    """Planned updates of the trial; None where the data is not known."""
    samples: tuple[Sample, ...] = ()
    held_out_pairs: HeldOutPairs | None = None
    failure: str = ""
    """The end of the traceback of a trial that failed."""
    judgements: tuple[Judgement, ...] = ()
    """Judgements of its answers."""
    seed_pairs: tuple[HeldOutPairs, ...] = ()
    """Of a configuration trained with several seeds: the held-out pairs of each complete trial."""

    @property
    def record(self) -> TrialRecord:
        """The trial's record in the study."""
        return self.curves.record

    @property
    def number(self) -> int:
        """Trial number, unique in the frame."""
        return self.curves.record.number

    def first(self, metric: str) -> float | None:
        """Return the metric at step 0, the initial model's value; None where not measured."""
        curve = self.curves.curves.get(metric)
        return curve[0][1] if curve and curve[0][0] == 0 else None

    def last(self, metric: str) -> float | None:
        """Return the metric's newest value; None where missing or not finite."""
        value = self.curves.last(metric)
        return value if value is not None and math.isfinite(value) else None

    def change(self, metric: str) -> float | None:
        """Return the newest value minus the initial model's."""
        before, after = self.first(metric), self.last(metric)
        return None if before is None or after is None else after - before

    @property
    def state_label(self) -> str:
        """The trial's state; DIVERGED for a trial that the divergence guard stopped."""
        return "DIVERGED" if self.record.diverged else str(self.record.state)

    @property
    def tokens(self) -> float | None:
        """Training tokens, summed from the tokens per pair of each logged update; None where none was logged."""
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
    """A sweep, or several merged ones, at one point in time."""

    name: str
    description: str
    objective: Objective
    paths: tuple[str, ...]
    """Searched settings, in order of the sweep file."""
    space: SearchSpace
    trials: tuple[TrialFrame, ...]
    spec: SweepSpec
    state: str
    """preparing, running, interrupted or finished."""
    at: float
    """Time of loading, seconds since the epoch."""
    hours: float = 0.0
    """Hours that the sweep's drivers worked."""
    planned: int | None = None
    """Total number of trials; None where not known."""
    data: DataReport | None = None
    events: tuple[Event, ...] = ()
    gpus: bool = False
    """Whether trials run on GPUs."""
    notices: tuple[str, ...] = ()
    """Messages about files that could not be read."""
    sweeps: tuple[str, ...] = ()
    """Names of the merged sweeps; empty for a single one."""
    further_objectives: tuple[Objective, ...] = ()
    """Objectives after the first, of a multi-objective sweep."""
    short_names: Mapping[str, str] = field(default_factory=dict[str, str])
    seed_trials: tuple[TrialFrame, ...] = ()
    """Each trial by itself, where `trials` are configurations trained with several seeds; else empty."""
    finalists: tuple[TrialFrame, ...] = ()
    """The finalists' configurations: means over their seeds, on held-out rows that `trials` were not evaluated on."""
    finalist_trials: tuple[TrialFrame, ...] = ()
    """Each trial of a finalist by itself."""
    confirmation: Confirmation | None = None
    """The comparison of the finalists; None before it was made, and for merged sweeps."""
    selected: frozenset[str] = frozenset()
    """Labels of the trials that a reader selected, which all charts highlight."""

    @property
    def all_trials(self) -> tuple[TrialFrame, ...]:
        """Every trial by itself, those of finalists too, for counts and costs."""
        return (*(self.seed_trials or self.trials), *self.finalist_trials)

    @property
    def judged(self) -> list[TrialFrame]:
        """Trials whose answers were judged: finalists, those of the recommended configuration first, then by rank."""
        recommended = None if self.confirmation is None else self.confirmation.recommended
        finalists = sorted(self.finalist_trials, key=lambda trial: trial.record.finalist_of != recommended)
        return [trial for trial in (*finalists, *self.ranked) if trial.judgements]

    def in_search(self, finalist_of: int) -> TrialFrame | None:
        """Return a finalist's configuration in the search."""
        return next((trial for trial in self.trials if first_number(trial.record) == finalist_of), None)

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """Every objective, the first one first."""
        return (self.objective, *self.further_objectives)

    def objective_value(self, trial: TrialFrame, objective: Objective) -> float | None:
        """Return a trial's value of an objective, of an incomplete trial the newest; None where missing."""
        values = trial.record.values
        if values is not None and len(values) == len(self.objectives):
            return values[self.objectives.index(objective)]
        return self.value(trial) if objective == self.objective else trial.last(objective.metric)

    @cached_property
    def ranked(self) -> list[TrialFrame]:
        """Complete trials, best first; configurations with all their seeds before others.

        Those that break a requirement come last. The configuration that the finalists recommend is the first.
        """
        by_number = {trial.number: trial for trial in self.trials}
        ranked = rank_trials([trial.record for trial in self.trials], self.objective, *self.further_objectives)
        if self.seed_trials:
            seeds = self.spec.seeds_per_configuration
            ranked.sort(key=lambda r: (not r.keeps_requirements, max(0, seeds - r.complete_seeds)))
        if self.confirmation is not None:
            recommended = self.confirmation.recommended
            ranked.sort(key=lambda r: (not r.keeps_requirements, first_number(r) != recommended))
        return [by_number[r.number] for r in ranked]

    @cached_property
    def eligible(self) -> list[TrialFrame]:
        """Complete trials that keep every requirement, best first: the first is the sweep's best."""
        return [trial for trial in self.ranked if trial.record.keeps_requirements]

    @cached_property
    def highlighted(self) -> list[TrialFrame]:
        """Trials in the order in which charts give them colors: the selected ones, else the best ones."""
        return [trial for trial in self.trials if trial.label in self.selected] or self.ranked

    @property
    def requirements_text(self) -> str:
        """Which complete trials break which requirement; "" if all keep every one."""
        return requirements_text([trial.record for trial in self.ranked])

    @property
    def broken_by_initial_model(self) -> tuple[str, ...]:
        """Requirements that the initial model does not keep either, as value and bound."""
        found = {r.metric: self.initial_value(r.metric) for r in self.spec.require}
        initial = {metric: value for metric, value in found.items() if value is not None}
        violations = find_violations(self.spec.require, initial, initial)
        return tuple(describe_break(name, missed, initial) for name, missed in violations.items() if missed > 0)

    @property
    def is_out_of_reach(self) -> bool:
        """Whether no complete trial keeps the requirements, nor does the initial model: no next search follows."""
        return bool(self.ranked) and not self.eligible and bool(self.broken_by_initial_model)

    @cached_property
    def comparable_trials(self) -> list[TrialFrame]:
        """Complete trials that started from the initial model (no forks), best first."""
        return [trial for trial in self.ranked if trial.record.fork is None]

    @cached_property
    def pareto_front(self) -> list[TrialFrame]:
        """Pareto front of a multi-objective sweep; empty with one objective."""
        by_number = {trial.number: trial for trial in self.trials}
        objectives = (self.objective, *self.further_objectives)
        return (
            [by_number[r.number] for r in pareto_front([trial.record for trial in self.trials], objectives)]
            if self.further_objectives
            else []
        )

    @property
    def sign(self) -> float:
        """1 for maximize, -1 for minimize."""
        return 1.0 if self.objective.direction == "maximize" else -1.0

    def initial_value(self, metric: str) -> float | None:
        """Return the initial model's value of a metric: step 0 of the first trial that has it; None where none has."""
        found = (trial.first(metric) for trial in self.trials)
        return next((value for value in found if value is not None and math.isfinite(value)), None)

    def value(self, trial: TrialFrame) -> float | None:
        """Return a trial's objective value, of an incomplete trial the newest; None where missing or not finite."""
        value = trial.record.value if trial.record.value is not None else trial.last(self.objective.metric)
        return value if value is not None and math.isfinite(value) else None

    def in_state(self, *states: TrialState) -> list[TrialFrame]:
        """Return the trials in these states."""
        return [trial for trial in self.trials if trial.record.state in states]

    def describe_params(self, trial: TrialFrame, paths: Sequence[str] | None = None) -> str:
        """Format as `beta 2, gamma 0.5`: searched settings and, of an enqueued trial, further settings of the user."""
        params: Mapping[str, Any] = trial.record.params
        shown_paths = list(dict.fromkeys([*self.paths, *params])) if paths is None else paths
        return ", ".join(f"{self.short_names.get(p, p)} {format_value(params[p])}" for p in shown_paths if p in params)
