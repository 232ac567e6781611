"""`Trial`, `TrialRecord`, `TrialState` and `Outcome`: what the study returns; ranking and Pareto front."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Self

from orchestrator.spec.objectives import Objective
from orchestrator.spec.requirements import describe_break
from orchestrator.spec.search.trial_params import SEED
from trainer.config.trial import TrialConfig


class TrialState(StrEnum):
    """State of a trial. COMPLETE, PRUNED and FAILED are final. PAUSED: begun, and paused by a user until unpaused."""

    RUNNING = "RUNNING"
    PAUSED = "PAUSED"
    COMPLETE = "COMPLETE"
    PRUNED = "PRUNED"
    FAILED = "FAILED"

    @property
    def is_final(self) -> bool:
        """Whether the state is final."""
        return self in (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAILED)


class FailureKind(StrEnum):
    """Why a trial failed. A lost worker is no failure of its trial, which gets another attempt."""

    OUT_OF_MEMORY = "OUT_OF_MEMORY"
    DATA = "DATA"
    BUG = "BUG"


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a trial ended, for `Study.tell`. `reason` is a text, required for every state but COMPLETE."""

    state: TrialState
    reason: str = ""
    failure: FailureKind | None = None
    diverged: bool = False

    def __post_init__(self) -> None:
        if not self.state.is_final:
            raise ValueError(f"an outcome is final; {self.state} is not")
        if self.state is not TrialState.COMPLETE and not self.reason:
            raise ValueError(f"{self.state} needs a reason")
        if (self.state is TrialState.FAILED) != (self.failure is not None):
            raise ValueError("a failure kind goes with FAILED and with nothing else")


@dataclass(frozen=True, slots=True)
class Fork:
    """Another trial's checkpoint that a trial continues from instead of starting from the initial model."""

    step: int
    """The update after which the checkpoint was written; the trial's own metrics begin after it."""
    folder_name: str
    """Name of a run folder in `forks/` that pins the checkpoint until the trial has one of its own."""

    def as_json(self) -> dict[str, Any]:
        """Return the fork as JSON values; the folder's name is stored as `place`."""
        return {"step": self.step, "place": self.folder_name}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Self:
        """Build the fork from its JSON values."""
        return cls(stored["step"], stored["place"])


@dataclass(frozen=True, slots=True)
class FailedAttempt:
    """A failure of a trial that was retried: its last attempt, why it failed and after which update."""

    attempt: int
    reason: str
    step: int


@dataclass(frozen=True, slots=True)
class Trial:
    """A trial to run. `attempt` counts from 1; a retried trial keeps its number and gets the next attempt."""

    number: int
    attempt: int
    params: Mapping[str, Any]
    config: TrialConfig
    micro_batch_limit: int | None = None
    """Limit on tokens per micro-batch, set after this or another trial ran out of memory."""
    fork: Fork | None = None
    first_attempt: int = 1
    """The first attempt since the trial was last retried after a failure; older ones are not continued."""


@dataclass(frozen=True, slots=True)
class WaitForTrial:
    """No trial can be issued before trial `number` ends: the next one's proposal or pruning depends on it."""

    number: int


@dataclass(frozen=True, slots=True)
class SeedResult:
    """One of the trials of a configuration that is trained with several seeds."""

    trial: int
    seed: int
    state: TrialState
    value: float | None
    """The first objective's value; None until complete."""


@dataclass(frozen=True, slots=True)
class TrialRecord:
    """The study's record of one trial, or of a configuration (`seeds`), whose values are means over its trials.

    `metrics`: the last value of each metric; `step`: the last update reported.
    """

    number: int
    state: TrialState
    params: Mapping[str, Any]
    attempts: int
    reason: str = ""
    failure: FailureKind | None = None
    diverged: bool = False
    step: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict[str, float])
    value: float | None = None
    """The objective's value (of several objectives, the first one's); None until complete."""
    values: tuple[float, ...] | None = None
    """The value of every objective; None until complete."""
    started_at: float | None = None
    finished_at: float | None = None
    seconds: float = 0.0
    """Training time of all attempts by the monotonic clock; under a killed driver up to its last report."""
    origin: str = ""
    """Who enqueued this trial and why; "" for one that the sampler proposed."""
    parent: int | None = None
    """The trial that it is a clone of."""
    fork: Fork | None = None
    """The parent's checkpoint that it continues from; None: it started from the initial model."""
    by_command: bool = False
    """Whether it was enqueued by a command, in addition to `budget.trials`."""
    failed_attempts: tuple[FailedAttempt, ...] = ()
    """Failures after which the trial was retried, oldest first."""
    seeds: tuple[SeedResult, ...] = ()
    """Of a configuration: each of its trials, by number; empty for a trial."""
    interval: tuple[float, float] | None = None
    """Of a configuration: 95% t interval of `value` over its seeds; None with fewer than two complete ones. Of a
    finalist that was compared: `confirmed_interval`."""
    violations: Mapping[str, float] = field(default_factory=dict[str, float])
    """By how much it misses each requirement of the sweep, by name, in the metric's units; at most 0: kept."""
    finalist_of: int | None = None
    """Of a finalist: the first trial of the configuration that it trains again; None for a trial of the search."""
    confirmed_interval: tuple[float, float] | None = None
    """Of a finalist that was compared: the interval of its configuration's mean, which counts seeds and pairs."""
    is_recommended: bool = False
    """Whether the comparison of the finalists recommends its configuration (`orchestrator.study.confirmation`)."""

    @property
    def keeps_requirements(self) -> bool:
        """Whether it keeps every requirement, as a best trial must."""
        return all(violation <= 0 for violation in self.violations.values())

    @property
    def breaks(self) -> tuple[str, ...]:
        """The broken requirements as value and bound, such as "eval_exact_answers 0.25 < 0.39"."""
        broken = {name: violation for name, violation in self.violations.items() if violation > 0}
        return tuple(describe_break(name, violation, self.metrics) for name, violation in broken.items())

    @property
    def miss(self) -> tuple[int, float]:
        """How many requirements it breaks, and the sum of the amounts; what breaks less is nearer to be the best."""
        return miss_of(self.violations)

    @property
    def first_attempt(self) -> int:
        """The first attempt since the trial was last retried after a failure."""
        return self.failed_attempts[-1].attempt + 1 if self.failed_attempts else 1

    @property
    def complete_seeds(self) -> int:
        """How many trials `value` is the mean of."""
        if not self.seeds:
            return int(self.state is TrialState.COMPLETE)
        return sum(seed.state is TrialState.COMPLETE for seed in self.seeds)

    @property
    def seeds_text(self) -> str:
        """What `value` is, such as "mean of 3 seeds, 95% interval 0.71 to 0.75"; "" for a trial."""
        if not self.seeds or not self.complete_seeds:
            return ""
        count = self.complete_seeds
        of = f" of {len(self.seeds)}" if count < len(self.seeds) else ""
        text = f"mean of {count}{of} seeds" if len(self.seeds) > 1 else "one seed"
        if self.interval is None:
            return text
        return f"{text}, 95% interval {self.interval[0]:.4g} to {self.interval[1]:.4g}"

    @property
    def trained_params(self) -> Mapping[str, Any]:
        """The params of trial `number`: of a configuration, with that trial's seed."""
        seed = next((seed.seed for seed in self.seeds if seed.trial == self.number), None)
        return self.params if seed is None else {**self.params, SEED: seed}

    @property
    def label(self) -> str:
        """The trial's number; of a configuration the numbers of its trials, such as "3-5"."""
        numbers = [seed.trial for seed in self.seeds] or [self.number]
        if len(numbers) > 1 and numbers == list(range(numbers[0], numbers[-1] + 1)):
            return f"{numbers[0]}-{numbers[-1]}"
        return ",".join(map(str, numbers))


class RequestKind(StrEnum):
    """Kind of a user's request to the driver, for the whole sweep or for one trial."""

    STOP = "stop"
    PAUSE = "pause"
    UNPAUSE = "unpause"
    PRUNE = "prune"
    RETRY = "retry"
    SET = "set"
    ABANDON = "abandon"


# Kinds of events.
DRIVER_EVENT = "driver"
REQUESTED_EVENT = "asked"
"""A user left a request."""
ANSWERED_EVENT = "answered"
"""The driver acted on a user's request, or refused it."""
LAPSED_EVENT = "lapsed"
"""A request to the previous driver expired: no driver acts on it."""
SKIPPED_EVENT = "left out"
"""An invalid combination that the sampler skipped."""
REPEAT_EVENT = "repeat"
"""A configuration was issued again with another seed."""
FINALIST_EVENT = "finalist"
"""A configuration was issued again as a finalist."""
CONFIRMED_EVENT = "confirmed"
"""The finalists were compared."""
DUPLICATE_EVENT = "twin"
"""A sampled configuration that equals an earlier trial's."""
ISSUED = "issued"
RELEASED = "released"
STOPPING = "stopping"
ABANDONED = "abandoned"
"""Beginning of a stop reason: the sweep was ended for good, with its unfinished trials."""
PAUSED = "paused"
UNPAUSED = "unpaused"


@dataclass(frozen=True, slots=True)
class Event:
    """An event of the sweep's history; `at` is a Unix time in seconds."""

    seq: int
    at: float
    trial: int | None
    kind: str
    text: str


@dataclass(frozen=True, slots=True)
class Request:
    """A user's request to the driver, such as to stop; `at` is a Unix time in seconds."""

    seq: int
    at: float
    trial: int | None
    kind: str
    """A `RequestKind`."""
    text: str


@dataclass(frozen=True, slots=True)
class SpecVersion:
    """A spec that the sweep ran with, as JSON, and its hash."""

    version: int
    at: float
    hash: str
    text: str


def miss_of(violations: Mapping[str, float]) -> tuple[int, float]:
    """Return how many requirements are broken, and the sum of the amounts."""
    broken = [violation for violation in violations.values() if violation > 0]
    return len(broken), sum(broken)


def rank_trials(records: Iterable[TrialRecord], *objectives: Objective) -> list[TrialRecord]:
    """Return the complete trials with finite objectives, best first; equal ones in order of number.

    With several objectives, trials are ordered by the number of fronts before their own (non-dominated sorting), then
    by the first objective. Trials that break a requirement follow those that keep all, the nearest to keep them first.
    """
    complete = [record for record in records if _has_finite_values(record)]
    remaining = [record for record in complete if record.keeps_requirements]
    broken = [record for record in complete if not record.keeps_requirements]
    out: list[TrialRecord] = []
    while remaining:
        front = remaining if len(objectives) == 1 else _undominated(remaining, objectives)
        out += sorted(front, key=lambda record: (_costs(record, objectives)[0], record.number))
        placed = {id(record) for record in front}
        remaining = [record for record in remaining if id(record) not in placed]
    return out + sorted(broken, key=lambda record: (record.miss, _costs(record, objectives)[0], record.number))


def best_of(ranked: Iterable[TrialRecord]) -> TrialRecord | None:
    """Return the first of ranked trials; None if there is none or if it breaks a requirement, as then all do."""
    first = next(iter(ranked), None)
    return first if first is not None and first.keeps_requirements else None


def requirements_text(ranked: Sequence[TrialRecord]) -> str:
    """Return which ranked trials break which requirement; "" if all keep every one.

    Where none keeps all, no trial is the best: the text also names the one that is nearest to it.
    """
    broken = sorted((record for record in ranked if not record.keeps_requirements), key=lambda record: record.number)
    if not broken:
        return ""
    by_name: dict[str, list[str]] = {}
    for record in broken:
        for name, violation in record.violations.items():
            if violation > 0:
                by_name.setdefault(name, []).append(record.label)
    listed = "; ".join(f"{name}: {_trials_text(labels)}" for name, labels in by_name.items())
    if len(broken) < len(ranked):
        return f"{len(broken)} of {len(ranked)} complete trials break a requirement and cannot be the best: {listed}"
    none = f"None of the {len(ranked)} complete trials keeps" if len(ranked) > 1 else "The complete trial does not keep"
    nearest = f"nearest is trial {ranked[0].label} ({'; '.join(ranked[0].breaks)})"
    return f"{none} every requirement, so none is the best; {nearest}; broken: {listed}"


def _trials_text(labels: Sequence[str], most: int = 10) -> str:
    shown = f"trial{'s' if len(labels) > 1 else ''} {', '.join(labels[:most])}"
    return shown if len(labels) <= most else f"{shown} and {len(labels) - most} more"


def pareto_front(records: Iterable[TrialRecord], objectives: Sequence[Objective]) -> list[TrialRecord]:
    """Return the Pareto front, best in the first objective first.

    The front holds the trials that no other one equals or beats in every objective, of those that keep the
    requirements.
    """
    ranked = [record for record in records if _has_finite_values(record) and record.keeps_requirements]
    return sorted(_undominated(ranked, objectives), key=lambda record: (_costs(record, objectives), record.number))


def _undominated(records: Sequence[TrialRecord], objectives: Sequence[Objective]) -> list[TrialRecord]:
    costs = [_costs(record, objectives) for record in records]
    return [
        record for record, own in zip(records, costs, strict=True) if not any(_dominates(other, own) for other in costs)
    ]


def _dominates(costs: Sequence[float], other_costs: Sequence[float]) -> bool:
    return costs != other_costs and all(cost <= other_cost for cost, other_cost in zip(costs, other_costs, strict=True))


def _costs(record: TrialRecord, objectives: Sequence[Objective]) -> tuple[float, ...]:
    """Return the objectives' values with signs such that lower is better."""
    values = record.values or (() if record.value is None else (record.value,))
    return tuple(
        -value if objective.direction == "maximize" else value
        for value, objective in zip(values, objectives, strict=False)
    )


def _has_finite_values(record: TrialRecord) -> bool:
    if record.state is not TrialState.COMPLETE or record.value is None:
        return False
    return all(math.isfinite(value) for value in record.values or (record.value,))
