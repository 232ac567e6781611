"""The visibility rule: `visible_trials` returns the results that trial n may depend on, by number and not by time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from orchestrator.study.trial_records import TrialState


@dataclass(frozen=True, slots=True)
class PastFailure:
    """A failure after which a trial was retried, once `trials` trials had been issued; `curve`: up to the failure."""

    trials: int
    curve: Mapping[int, float]


@dataclass(frozen=True, slots=True)
class TrialSnapshot:
    """One trial as samplers and pruners see it. A running one has params and no results."""

    number: int
    params: Mapping[str, Any]
    state: TrialState = TrialState.RUNNING
    values: tuple[float, ...] | None = None
    """The objectives' values: final ones of a complete trial, the last reported ones of a pruned trial."""
    curve: Mapping[int, float] = field(default_factory=dict[int, float])
    """The pruner's metric by update, without the initial model's."""
    diverged: bool = False
    updates: int | None = None
    """Updates of the whole run; None if the data's size is unknown."""
    sampler_note: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """The sampler's own data about the trial, such as its generation."""
    is_enqueued: bool = False
    """Enqueued by a user, not proposed by the sampler."""
    by_command: bool = False
    """Enqueued while the sweep ran, or a finalist: on top of `budget.trials`."""
    fingerprint: str = ""
    is_fork: bool = False
    """Continues another trial's checkpoint: its result is not that of its params alone, so samplers ignore it."""
    failures: tuple[PastFailure, ...] = ()
    """Failures after which it was retried, oldest first."""
    violations: Mapping[str, float] = field(default_factory=dict[str, float])
    """By how much it misses each requirement, by name; empty without requirements, and where none was measured."""
    finalist_of: int | None = None
    """Of a finalist: the first trial of the configuration that it trains again."""

    @property
    def is_hidden(self) -> bool:
        """Whether no sampler and no pruner may see it: a fork, or a finalist, evaluated on other rows."""
        return self.is_fork or self.finalist_of is not None


def as_running(trial: TrialSnapshot) -> TrialSnapshot:
    """Return the trial without its results, as if it still ran."""
    return replace(trial, state=TrialState.RUNNING, values=None, curve={}, diverged=False, violations={})


def as_seen_by(trial: TrialSnapshot, number: int) -> TrialSnapshot:
    """Return the trial as trial `number` may know it: FAILED if it was retried only after that one was issued."""
    failure = next((past for past in trial.failures if number < past.trials), None)
    if failure is None:
        return trial
    return replace(trial, state=TrialState.FAILED, values=None, curve=failure.curve, diverged=False, violations={})


def visible_trials(trials: Sequence[TrialSnapshot], number: int, lag: int | None) -> list[TrialSnapshot]:
    """Return the earlier trials; those after number - lag appear as running, without results.

    A trial that was retried after trial `number` was issued stays FAILED for it, so that no decision about it changes.
    Without a lag all existing results are visible. Forks and finalists are never visible.
    """
    before = [trial for trial in trials if trial.number < number and not trial.is_hidden]
    if lag is None:
        return before
    before = [as_seen_by(trial, number) for trial in before]
    return [trial if trial.number <= number - lag else as_running(trial) for trial in before]


def first_unfinished(trials: Sequence[TrialSnapshot], up_to: int) -> int | None:
    """Return the first unfinished trial up to number `up_to` that is neither fork nor finalist; None without one."""
    return next(
        (
            trial.number
            for trial in trials
            if trial.number <= up_to and not trial.state.is_final and not trial.is_hidden
        ),
        None,
    )
