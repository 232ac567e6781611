"""The trials in the hands of this process's workers: how each is held, put aside, given back and ended."""

from __future__ import annotations

import time

from optuna.trial import FrozenTrial
from sqlalchemy import Connection

from orchestrator.folders import SweepFolder
from orchestrator.study import reading, records
from orchestrator.study.driven import DrivenStudy
from orchestrator.study.ending import outcome_to_json, settle
from orchestrator.study.errors import NotHeld, TrialFinished
from orchestrator.study.held import Held
from orchestrator.study.reading import ASKED, OUTCOME, PAUSED, STARTED, TO_OPTUNA, VALUES
from orchestrator.study.records import Trial, TrialRecord
from orchestrator.study.spending import Spent
from orchestrator.study.state import Outcome
from orchestrator.study.store import Store


class HoldingStudy(DrivenStudy):
    """A driven study that knows which trials its workers have."""

    def __init__(self, folder: SweepFolder, store: Store) -> None:
        super().__init__(folder, store)
        self._held: dict[int, Held] = {}

    def begun(self, trial: Trial) -> None:
        """A worker has begun with this trial: GPU time counts from now on, not from when it was issued. The first call
        counts."""
        self._hold(trial, "beginning it").begin()

    def close(self, trial: Trial, outcome: Outcome, worker: str = "") -> TrialRecord:
        """End the trial for good; the record says how it ended. The same again changes nothing, another is refused.

        `worker`: by which it was trained, noted beside its end.
        """
        asked = outcome_to_json(outcome)
        with self._driving() as c:
            frozen = self._find(trial.number)
            if frozen is not None and frozen.user_attrs.get(ASKED) == asked:
                return self._record(c, frozen)
            held = self._hold(trial, f"closing it as {outcome.state}")
            self._worked(c, held)
            record = self._finish(c, held.trial_id, outcome)
            if worker:
                self._ledger.add_event(c, "worker", worker, trial.number)
        del self._held[trial.number]
        return record

    def release(self, trial: Trial) -> None:
        """The trial is interrupted, not ended: it stays RUNNING and is issued again by a later claim."""
        with self._driving() as c:
            held = self._hold(trial, "releasing it")
            self._worked(c, held)
            self._ledger.add_event(c, "released", f"attempt {trial.attempt} interrupted", trial.number)
        del self._held[trial.number]

    # --- by hand -------------------------------------------------------------------------------------------------

    def pause(self, number: int, why: str) -> None:
        """Put a begun trial aside: it is not issued again before `unpause`. A held one must have checkpointed."""
        with self._driving() as c:
            trial_id = self._unfinished(number, "pausing it")
            if number in self._held:
                self._worked(c, self._held[number])
            self._set(trial_id, PAUSED, why)
            self._ledger.add_event(c, records.PAUSED, why, number)
        self._held.pop(number, None)

    def unpause(self, number: int, why: str) -> None:
        """Have it issued again, before any new trial."""
        with self._driving() as c:
            self._set(self._unfinished(number, "unpausing it"), PAUSED, "")
            self._ledger.add_event(c, records.UNPAUSED, why, number)

    def dismiss(self, number: int, outcome: Outcome) -> TrialRecord:
        """End a begun trial that no worker has."""
        with self._driving() as c:
            record = self._finish(c, self._unfinished(number, f"closing it as {outcome.state}"), outcome)
        self._held.pop(number, None)
        return record

    # --- inside --------------------------------------------------------------------------------------------------

    def _finish(self, c: Connection, trial_id: int, outcome: Outcome) -> TrialRecord:
        frozen = self._remembered.trial(trial_id)
        _, seen = self._ledger.progress_of(c, frozen.number)
        final, values = settle(outcome, seen, self.spec.goals)
        order = self._ledger.add_event(c, final.state.lower(), final.reason, frozen.number)
        finished = max(time.time(), frozen.user_attrs[STARTED])
        self._set(trial_id, ASKED, outcome_to_json(outcome))
        self._set(trial_id, OUTCOME, outcome_to_json(final) | {"order": order, "finished_at": finished})
        if values is not None:
            self._set(trial_id, VALUES, [str(value) for value in values])  # JSON has no infinity
        self._remembered.finish(trial_id, TO_OPTUNA[final.state], values)
        return self._record(c, self._remembered.trial(trial_id))

    def _find(self, number: int) -> FrozenTrial | None:
        frozen = self._frozen()
        return frozen[number] if number < len(frozen) else None

    def _set(self, trial_id: int, key: str, value: object) -> None:
        self._remembered.set(trial_id, key, value)

    def _hold(self, trial: Trial, asked: str) -> Held:
        held = self._held.get(trial.number)
        if held is not None and held.attempt == trial.attempt:
            return held
        frozen = self._find(trial.number)
        if frozen is not None and frozen.state.is_finished():
            raise TrialFinished(trial.number, reading.FROM_OPTUNA[frozen.state], asked)
        raise NotHeld(trial.number, trial.attempt, None if held is None else held.attempt)

    def _unfinished(self, number: int, asked: str) -> int:
        """Optuna's id of a trial that has begun and not ended."""
        frozen = self._find(number)
        if frozen is None:
            raise NotHeld(number, 0, None)
        if frozen.state.is_finished():
            raise TrialFinished(number, reading.FROM_OPTUNA[frozen.state], asked)
        return self._remembered.id_of(number)

    def _worked(self, c: Connection, held: Held) -> None:
        self._ledger.attempt_worked(c, held.number, held.attempt, held.seconds)

    def _spent(self, c: Connection) -> Spent:
        """Of other processes what they wrote; of this one up to now."""
        if self._driver is None:
            return super()._spent(c)
        written = self._ledger.gpu_seconds(c, but={(h.number, h.attempt) for h in self._held.values()})
        held = sum(h.seconds * h.gpus for h in self._held.values())
        return Spent(self._driver.seconds_of_all(c) / 3600, (written + held) / 3600)
