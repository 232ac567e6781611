"""Optuna's trials as the house knows them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from optuna.trial import FrozenTrial
from optuna.trial import TrialState as OptunaState

from orchestrator.study.knowing import Known
from orchestrator.study.records import Fork, TrialRecord
from orchestrator.study.state import FailureKind, TrialState

TO_OPTUNA = {
    TrialState.RUNNING: OptunaState.RUNNING,
    TrialState.COMPLETE: OptunaState.COMPLETE,
    TrialState.PRUNED: OptunaState.PRUNED,
    TrialState.FAILED: OptunaState.FAIL,
}
FROM_OPTUNA = {theirs: ours for ours, theirs in TO_OPTUNA.items()}

# Keys of a trial's user attributes.
IDENTITY = "identity"
ATTEMPTS = "attempts"
STARTED = "started_at"
PAUSED = "paused"
"""Why a running trial is put aside; empty or absent while it is not."""
OUTCOME = "outcome"
VALUES = "values"
NOTE = "note"
UPDATES = "updates"
ASKED = "asked"
MICRO_BATCH = "micro_batch"
GIVEN = "given"
"""Of a trial that was given, not drawn: `leaves` over the base, all `params`, `origin`, `by_hand`, `parent`,
`fork` (`step` and `place`, or None).

Optuna's own params of it are those that the search could have drawn.
"""


PARAMS = "params"
"""All params of a drawn trial of which Optuna keeps only some: staged search also starts from and returns to values
that the search does not list, for which Optuna's distributions have no room."""


def record(
    trial: FrozenTrial, step: int, metrics: dict[str, float], order: Sequence[str], seconds: float
) -> TrialRecord:
    """All that is known of a trial; its params in the file's order."""
    kept = trial.user_attrs
    ended: dict[str, Any] = kept.get(OUTCOME, {})
    failure = ended.get("failure")
    values = tuple(trial.values) if trial.state is OptunaState.COMPLETE else None
    return TrialRecord(
        number=trial.number,
        state=TrialState.PAUSED if is_paused(trial) else FROM_OPTUNA[trial.state],
        params=params(trial, order),
        attempts=kept[ATTEMPTS],
        reason=ended.get("reason", kept.get(PAUSED, "")),
        failure=None if failure is None else FailureKind(failure),
        diverged=ended.get("diverged", False),
        step=step,
        metrics=metrics,
        value=None if values is None else values[0],
        values=values,
        started_at=kept[STARTED],
        finished_at=ended.get("finished_at"),
        seconds=seconds,
        origin=kept.get(GIVEN, {}).get("origin", ""),
        parent=kept.get(GIVEN, {}).get("parent"),
        fork=fork(trial),
    )


def fork(trial: FrozenTrial) -> Fork | None:
    """The checkpoint of another trial that this one goes on from."""
    held = trial.user_attrs.get(GIVEN, {}).get("fork")
    return None if held is None else Fork(held["step"], held["place"])


def is_running(trial: FrozenTrial) -> bool:
    """Whether it has begun and not ended."""
    return trial.state is OptunaState.RUNNING


def is_paused(trial: FrozenTrial) -> bool:
    """Whether somebody put this trial aside."""
    return is_running(trial) and bool(trial.user_attrs.get(PAUSED))


def params(trial: FrozenTrial, order: Sequence[str]) -> dict[str, Any]:
    """A trial's leaves in the file's order; of a given one also those outside the search."""
    held = _params(trial)
    listed = {path: held[path] for path in order if path in held}
    return listed | {path: value for path, value in held.items() if path not in listed}


def _params(trial: FrozenTrial) -> dict[str, Any]:
    kept = trial.user_attrs
    return kept[GIVEN]["params"] if GIVEN in kept else kept.get(PARAMS, trial.params)


def known(trial: FrozenTrial) -> Known:
    """The trial as samplers and pruners see it."""
    kept = trial.user_attrs
    values = kept.get(VALUES)
    return Known(
        number=trial.number,
        params=_params(trial),
        state=FROM_OPTUNA[trial.state],
        values=None if values is None else tuple(float(value) for value in values),
        course={step: value for step, value in sorted(trial.intermediate_values.items()) if step > 0},
        diverged=kept.get(OUTCOME, {}).get("diverged", False),
        updates=kept.get(UPDATES),
        note=kept.get(NOTE, {}),
        given=GIVEN in kept,
        by_hand=bool(kept.get(GIVEN, {}).get("by_hand")),
        identity=kept[IDENTITY],
        forked=fork(trial) is not None,
    )


def learned_micro_batch(trials: Iterable[FrozenTrial]) -> int | None:
    """The smallest token budget that a trial was issued with for want of memory; None where none ran out.

    What did not help, as the trial failed for memory all the same, teaches nothing.
    """
    found = [t.user_attrs[MICRO_BATCH] for t in trials if MICRO_BATCH in t.user_attrs and not _failed_for_memory(t)]
    return min(found, default=None)


def _failed_for_memory(trial: FrozenTrial) -> bool:
    return trial.user_attrs.get(OUTCOME, {}).get("failure") == FailureKind.OUT_OF_MEMORY


def consecutive_bugs(trials: Iterable[FrozenTrial]) -> tuple[int, str]:
    """How many of the trials that ended last ended in the same BUG, and its text."""
    ended = sorted((t for t in trials if OUTCOME in t.user_attrs), key=lambda t: t.user_attrs[OUTCOME]["order"])
    count, text = 0, ""
    for trial in reversed(ended):
        outcome = trial.user_attrs[OUTCOME]
        if outcome["failure"] != FailureKind.BUG or (count and outcome["reason"] != text):
            break
        count, text = count + 1, outcome["reason"]
    return count, text
