"""Retries of failed trials: a retried trial keeps its number and configuration and begins from its initial model.

The failed attempts stay in the history and in the trial's record. Trials that were issued before the retry still see
the trial as failed (`trial_snapshots.as_seen_by`), later ones wait for its result, so that a sweep stays reproducible.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from optuna.trial import FrozenTrial
from sqlalchemy import Connection

from orchestrator.folders import SweepFolder
from orchestrator.study.database import optuna_trials
from orchestrator.study.database.optuna_trials import (
    ATTEMPTS,
    FAILURES,
    MICRO_BATCH,
    OUTCOME,
    REQUESTED_OUTCOME,
    OptunaTrials,
)
from orchestrator.study.database.repository import SweepRepository
from orchestrator.study.trial_records import DRIVER_EVENT, ISSUED, STOPPING, Event, FailureKind, TrialRecord, TrialState
from trainer.results import clause

RETRIED = "retried"
"""Kind of the event of a retry."""


def reopen(
    connection: Connection, trials: OptunaTrials, repository: SweepRepository, numbers: Iterable[int], why: str
) -> None:
    """Make these failed trials unfinished again, without their metrics: they are issued before any new trial."""
    frozen = trials.trials()
    for number in numbers:
        trial, trial_id = frozen[number], trials.optuna_id(number)
        attempt, reason = trial.user_attrs[ATTEMPTS], trial.user_attrs[OUTCOME]["reason"]
        step = repository.progress_of(connection, number)[0]
        curve = {at: value for at, value in trial.intermediate_values.items() if at > 0}
        failure = {"attempt": attempt, "reason": reason, "step": step, "trials": len(frozen), "curve": curve}
        trials.reopen(connection, trial_id)
        repository.remove_metrics(connection, number)
        trials.set(trial_id, FAILURES, [*trial.user_attrs.get(FAILURES, ()), failure])
        for key, value in ((OUTCOME, {}), (REQUESTED_OUTCOME, None), (MICRO_BATCH, None)):
            trials.set(trial_id, key, value)
        repository.add_event(
            connection, RETRIED, f"attempt {attempt} failed after update {step}: {clause(reason)}; {why}", number
        )


def failed_alike(frozen: Iterable[FrozenTrial], events: Sequence[Event], same_bug: str) -> list[int]:
    """Return the trials that failed by a bug in a row before the sweep stopped for it, or while it stopped.

    Empty if the last stop had another reason, or if a later driver has gone on. `same_bug`: how the text of that stop
    begins.
    """
    stop = next((event for event in reversed(events) if event.kind == STOPPING), None)
    if stop is None or not stop.text.startswith(same_bug):
        return []
    driver = next((event.seq for event in events if event.kind == DRIVER_EVENT and event.seq > stop.seq), None)
    if driver is not None and any(event.kind == ISSUED and event.seq > driver for event in events):
        return []  # a later driver has gone on
    found: list[int] = []
    for trial in reversed(optuna_trials.by_end(frozen)):
        ended = trial.user_attrs[OUTCOME]
        if ended["failure"] == FailureKind.BUG:
            found.append(trial.number)
        elif ended["order"] < stop.seq:
            break
    return sorted(found)


def can_begin_again(record: TrialRecord, folder: SweepFolder) -> bool:
    """Return whether the trial's start is still there: a clone's checkpoint is removed once the clone has ended."""
    return record.fork is None or (folder.forks / record.fork.folder_name).is_dir()


def never_trained(records: Iterable[TrialRecord]) -> list[int]:
    """Return the numbers of the failed trials: their configurations were never trained to the last update."""
    return [record.number for record in records if record.state is TrialState.FAILED]


def numbers_text(numbers: Sequence[int], most: int = 12) -> str:
    """Return trial numbers as text, such as "0, 3, 4"; of many, the first ones."""
    listed = ", ".join(map(str, numbers[:most]))
    return listed if len(numbers) <= most else f"{listed} and {len(numbers) - most} more"
