"""Optuna's trials, kept as they were read: one that ended is read once, and the driver's own writes are known to it.

Optuna's trials as the house knows them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial
from optuna.trial import TrialState as OptunaState

from orchestrator.study.trial_records import FailureKind, Fork, TrialRecord, TrialState
from orchestrator.study.trial_snapshots import Known

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
PAUSE_REASON = "paused"
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
        reason=ended.get("reason", kept.get(PAUSE_REASON, "")),
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
    return is_running(trial) and bool(trial.user_attrs.get(PAUSE_REASON))


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


class Remembered:
    """All trials of a study, read again only where they may have changed, and the way to change them.

    In a process that only reads, those are the unfinished and the new ones. In the driver, whose writes alone are
    accepted, they are those that it touched itself. What is read or written inside a transaction that then fails must
    be forgotten: it never happened.
    """

    def __init__(self, storage: RDBStorage, study_id: int) -> None:
        self._storage, self._study_id = storage, study_id
        self._alone = False
        self.forget()

    def forget(self) -> None:
        """Read everything anew next time."""
        self._trials: list[FrozenTrial] = []
        self._ids: dict[int, int] = {}
        self._stale: set[int] = set()
        self._more = True
        self._last = -1
        self._open: set[int] = set()
        self._known: list[Known] = []
        self._attrs: dict[str, Any] | None = None

    def alone(self) -> None:
        """From now on nobody else changes a trial: this process drives, and older drivers are fenced off."""
        self.forget()
        self._alone = True

    # --- reading -------------------------------------------------------------------------------------------------

    def trials(self) -> list[FrozenTrial]:
        """Every trial by number, as the open transaction sees them. Not to be changed."""
        if self._more or self._stale or not self._alone:
            read = self._storage._get_trials(  # pyright: ignore[reportPrivateUsage]  what Optuna's own cache reads with
                self._study_id, None, included_trial_ids=set(self._stale), trial_id_greater_than=self._last
            )
            for trial in read:
                self._put(trial)
            self._more = False
        return list(self._trials)

    def unfinished(self) -> list[FrozenTrial]:
        """Those that have not ended, by number."""
        self.trials()
        return [self._trials[number] for number in sorted(self._open)]

    def known(self) -> list[Known]:
        """Every trial as samplers and pruners see it."""
        for trial in self.unfinished():
            self._known[trial.number] = known(trial)
        return list(self._known)

    def trial(self, trial_id: int) -> FrozenTrial:
        """One trial by Optuna's id."""
        return self.trials()[self._ids[trial_id]]

    def study_attrs(self) -> Mapping[str, Any]:
        """What is written down of the study as a whole."""
        if self._attrs is None or not self._alone:
            self._attrs = self._storage.get_study_user_attrs(self._study_id)
        return self._attrs

    def id_of(self, number: int) -> int:
        """Optuna's id of a trial that was read."""
        return self._trials[number]._trial_id  # pyright: ignore[reportPrivateUsage]

    # --- writing, inside a transaction ---------------------------------------------------------------------------

    def create(self, template: FrozenTrial) -> int:
        """A new trial; Optuna's id of it."""
        self._more = True
        return self._storage.create_new_trial(self._study_id, template)

    def set(self, trial_id: int, key: str, value: Any) -> None:
        """Write something down of an unfinished trial."""
        self._storage.set_trial_user_attr(trial_id, key, value)
        if (trial := self._mine(trial_id)) is not None:
            trial.user_attrs[key] = json.loads(json.dumps(value))  # as it will be read

    def evaluated(self, trial_id: int, step: int, value: float) -> None:
        """The pruner's metric of an unfinished trial at one update."""
        self._storage.set_trial_intermediate_value(trial_id, step, value)
        if (trial := self._mine(trial_id)) is not None:
            trial.intermediate_values[step] = value

    def finish(self, trial_id: int, state: OptunaState, values: Sequence[float] | None) -> None:
        """The trial has ended."""
        self._storage.set_trial_state_values(trial_id, state, values)
        self._stale.add(trial_id)

    def set_study(self, key: str, value: Any) -> None:
        """Write something down of the study as a whole."""
        self._storage.set_study_user_attr(self._study_id, key, value)
        self._attrs = None

    # --- inside --------------------------------------------------------------------------------------------------

    def _mine(self, trial_id: int) -> FrozenTrial | None:
        """The trial where it is kept as it is; None where it will be read anyway."""
        if trial_id in self._stale or trial_id not in self._ids:
            return None
        return self._trials[self._ids[trial_id]]

    def _put(self, trial: FrozenTrial) -> None:
        trial_id = trial._trial_id  # pyright: ignore[reportPrivateUsage]
        if trial.number == len(self._trials):
            self._trials.append(trial)
            self._known.append(known(trial))
            self._ids[trial_id] = trial.number
        else:
            self._trials[trial.number] = trial
            self._known[trial.number] = known(trial)
        self._last = max(self._last, trial_id)
        ended = trial.state.is_finished()
        (self._open.discard if ended else self._open.add)(trial.number)
        (self._stale.discard if ended or self._alone else self._stale.add)(trial_id)
