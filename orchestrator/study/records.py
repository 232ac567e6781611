"""What the study hands out: a trial to run, and the record of one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from orchestrator.study.state import FailureKind, TrialState
from trainer.config import TrialConfig


@dataclass(frozen=True, slots=True)
class Fork:
    """Where a trial goes on from, instead of the start model: another trial's checkpoint."""

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
class NotYet:
    """No trial can be issued before trial `waits_for` has ended: the next one's draw or verdicts depend on it."""

    waits_for: int


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
    """The goal's value (of several goals, the first one's); None until complete."""
    values: tuple[float, ...] | None = None
    """The value of every goal; None until complete."""
    started_at: float | None = None
    finished_at: float | None = None
    seconds: float = 0.0
    """Time in workers' hands, all attempts, by the monotonic clock; of a killed driver up to its last report."""
    origin: str = ""
    """Who gave this trial and why, in words; empty for one that the sampler drew."""
    parent: int | None = None
    """The trial that it is a clone of."""
    fork: Fork | None = None
    """The parent's checkpoint that it goes on from; None: from the start model."""


# Kinds of events that are read back.
DRIVER = "driver"
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
