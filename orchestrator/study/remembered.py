"""Trials that ended are final: each is read from the database once, whatever the number of trials."""

from __future__ import annotations

from collections.abc import Sequence

from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial

from orchestrator.study import reading
from orchestrator.study.knowing import Known


class Remembered:
    """All trials of a study, of which only the unfinished and the new ones are read again.

    What is read inside a transaction that then fails must be forgotten: it never happened.
    """

    def __init__(self, storage: RDBStorage, study_id: int) -> None:
        self._storage, self._study_id = storage, study_id
        self.forget()

    def forget(self) -> None:
        """Read everything anew next time."""
        self._trials: list[FrozenTrial] = []
        self._open: set[int] = set()
        self._last = -1
        self._known: dict[int, Known] = {}

    def trials(self) -> list[FrozenTrial]:
        """Every trial by number, as the open transaction sees them. Not to be changed."""
        read = self._storage._get_trials(  # pyright: ignore[reportPrivateUsage]  what Optuna's own cache reads with
            self._study_id, None, included_trial_ids=set(self._open), trial_id_greater_than=self._last
        )
        for trial in read:
            self._put(trial)
        return list(self._trials)

    def known(self, trials: Sequence[FrozenTrial] | None = None) -> list[Known]:
        """The same as samplers and pruners see them; `trials` were just read."""
        return [self._as_known(trial) for trial in (self.trials() if trials is None else trials)]

    def _put(self, trial: FrozenTrial) -> None:
        trial_id = trial._trial_id  # pyright: ignore[reportPrivateUsage]
        if trial.number == len(self._trials):
            self._trials.append(trial)
        else:
            self._trials[trial.number] = trial
        self._last = max(self._last, trial_id)
        if trial.state.is_finished():
            self._open.discard(trial_id)
        else:
            self._open.add(trial_id)

    def _as_known(self, trial: FrozenTrial) -> Known:
        if not trial.state.is_finished():
            return reading.known(trial)
        found = self._known.get(trial.number)
        if found is None:
            found = self._known[trial.number] = reading.known(trial)
        return found
