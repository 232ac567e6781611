"""`Trial`, `TrialRecord`, `TrialState` and `Outcome`: what the study returns; ranking and Pareto front."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from orchestrator.spec.objectives import Objective
from trainer.config.trial import TrialConfig


class TrialState(StrEnum):
    """Finished states (COMPLETE, PRUNED, FAILED) are final. PAUSED: begun, and put aside by hand until unpaused."""

    RUNNING = "RUNNING"
    PAUSED = "PAUSED"
    COMPLETE = "COMPLETE"
    PRUNED = "PRUNED"
    FAILED = "FAILED"

    @property
    def finished(self) -> bool:
        """Whether nothing can change any more."""
        return self in (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAILED)


class FailureKind(StrEnum):
    """Why a trial failed. A dead worker is none of these: its trial is issued again."""

    OUT_OF_MEMORY = "OUT_OF_MEMORY"
    DATA = "DATA"
    BUG = "BUG"


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a trial ended, for `Study.close`. `reason` is in words and required for everything but COMPLETE."""

    state: TrialState
    reason: str = ""
    failure: FailureKind | None = None
    diverged: bool = False

    def __post_init__(self) -> None:
        if not self.state.finished:
            raise ValueError(f"an outcome is final; {self.state} is not")
        if self.state is not TrialState.COMPLETE and not self.reason:
            raise ValueError(f"{self.state} needs a reason")
        if (self.state is TrialState.FAILED) != (self.failure is not None):
            raise ValueError("a failure kind goes with FAILED and with nothing else")


@dataclass(frozen=True, slots=True)
class Fork:
    """Where a trial goes on from, instead of the initial model: another trial's checkpoint."""

    step: int
    """The update after which it was written; the trial's own points begin after it."""
    place: str
    """Its name among the sweep's forks: a run folder that holds this checkpoint until the trial has one of its own."""


@dataclass(frozen=True, slots=True)
class Trial:
    """A trial to run. `attempt` counts from 1; a trial issued again keeps its number and gets the next attempt."""

    number: int
    attempt: int
    params: Mapping[str, Any]
    config: TrialConfig
    micro_batch: int | None = None
    """At most so many tokens per micro-batch, learned where this or an earlier trial ran out of memory."""
    fork: Fork | None = None


@dataclass(frozen=True, slots=True)
class WaitForTrial:
    """No trial can be issued before trial `number` has ended: the next one's draw or decisions depend on it."""

    number: int


@dataclass(frozen=True, slots=True)
class TrialRecord:
    """All that is known of one trial. `metrics` holds the last value of each metric, `step` the last update seen."""

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
    """Time in workers' hands, all attempts, by the monotonic clock; of a killed driver up to its last report."""
    origin: str = ""
    """Who gave this trial and why, in words; empty for one that the sampler drew."""
    parent: int | None = None
    """The trial that it is a clone of."""
    fork: Fork | None = None
    """The parent's checkpoint that it goes on from; None: from the initial model."""


# Kinds of events that are read back.
DRIVER_EVENT = "driver"
STOPPING = "stopping"
PAUSED = "paused"
UNPAUSED = "unpaused"


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to the sweep, in order."""

    seq: int
    at: float
    trial: int | None
    kind: str
    text: str


@dataclass(frozen=True, slots=True)
class Request:
    """What somebody at another terminal asked the driver to do."""

    seq: int
    at: float
    trial: int | None
    kind: str
    text: str


@dataclass(frozen=True, slots=True)
class SpecVersion:
    """A spec as it was accepted (JSON) and its hash."""

    version: int
    at: float
    hash: str
    text: str


def rank_trials(records: Iterable[TrialRecord], *objectives: Objective) -> list[TrialRecord]:
    """Complete trials, best first; equal ones in order of number. Non-finite values never rank.

    With several objectives, trials are ordered by the number of fronts before their own (non-dominated sorting), then
    by the first objective.
    """
    left = [record for record in records if _has_finite_values(record)]
    out: list[TrialRecord] = []
    while left:
        layer = left if len(objectives) == 1 else _undominated(left, objectives)
        out += sorted(layer, key=lambda r: (_costs(r, objectives)[0], r.number))
        left = [record for record in left if record not in layer]
    return out


def pareto_front(records: Iterable[TrialRecord], objectives: Sequence[Objective]) -> list[TrialRecord]:
    """Return the Pareto front, best in the first objective first.

    The front holds the trials that no other one equals or beats in every objective.
    """
    ranked = [record for record in records if _has_finite_values(record)]
    return sorted(_undominated(ranked, objectives), key=lambda r: (_costs(r, objectives), r.number))


def _undominated(records: Sequence[TrialRecord], objectives: Sequence[Objective]) -> list[TrialRecord]:
    costs = [_costs(record, objectives) for record in records]
    return [r for r, mine in zip(records, costs, strict=True) if not any(_dominates(other, mine) for other in costs)]


def _dominates(a: Sequence[float], b: Sequence[float]) -> bool:
    return a != b and all(x <= y for x, y in zip(a, b, strict=True))


def _costs(record: TrialRecord, objectives: Sequence[Objective]) -> tuple[float, ...]:
    """The values, less being better."""
    values = record.values or (() if record.value is None else (record.value,))
    return tuple(-v if g.direction == "maximize" else v for v, g in zip(values, objectives, strict=False))


def _has_finite_values(record: TrialRecord) -> bool:
    if record.state is not TrialState.COMPLETE or record.value is None:
        return False
    return all(math.isfinite(value) for value in record.values or (record.value,))
