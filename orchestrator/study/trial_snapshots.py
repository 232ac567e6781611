"""`TrialSnapshot`, `visible_trials`: what trial n may know of others; decided by numbers, not by who finished first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from orchestrator.study.trial_records import TrialState


@dataclass(frozen=True, slots=True)
class TrialSnapshot:
    """One trial as samplers and pruners see it. A running one has its params alone."""

    number: int
    params: Mapping[str, Any]
    state: TrialState = TrialState.RUNNING
    values: tuple[float, ...] | None = None
    """The objectives' values: final ones of a complete trial, the last seen ones of a pruned trial."""
    curve: Mapping[int, float] = field(default_factory=dict[int, float])
    """The pruner's metric by update, the initial model's left out."""
    diverged: bool = False
    updates: int | None = None
    """Updates of the whole run; None where the data's size is unknown."""
    note: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """What the sampler wrote down when it drew the trial."""
    is_enqueued: bool = False
    """Asked for by a person, not drawn."""
    is_by_hand: bool = False
    """Asked for while the sweep went on: on top of the budget of trials."""
    fingerprint: str = ""
    is_fork: bool = False
    """Begun from another trial's checkpoint: its result is not that of its params, so that it is no lesson."""


def as_running(trial: TrialSnapshot) -> TrialSnapshot:
    """The trial as if it still ran."""
    return replace(trial, state=TrialState.RUNNING, values=None, curve={}, diverged=False)


def visible_trials(trials: Sequence[TrialSnapshot], number: int, lag: int | None) -> list[TrialSnapshot]:
    """All trials before `number` as it may know them: results up to number - lag, later ones as running.

    Without a lag everything that has finished by now is known. Nobody is compared with a fork.
    """
    before = [trial for trial in trials if trial.number < number and not trial.is_fork]
    if lag is None:
        return before
    return [trial if trial.number <= number - lag else as_running(trial) for trial in before]


def first_unfinished(trials: Sequence[TrialSnapshot], up_to: int) -> int | None:
    """The first trial up to this number that has not ended and that others may learn from."""
    return next((t.number for t in trials if t.number <= up_to and not t.state.finished and not t.is_fork), None)
