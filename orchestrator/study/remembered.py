"""Optuna's trials, kept as they were read: one that ended is read once, and the driver's own writes are known to it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial
from optuna.trial import TrialState as OptunaState

from orchestrator.study import reading
from orchestrator.study.knowing import Known


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
            self._known[trial.number] = reading.known(trial)
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
            self._known.append(reading.known(trial))
            self._ids[trial_id] = trial.number
        else:
            self._trials[trial.number] = trial
            self._known[trial.number] = reading.known(trial)
        self._last = max(self._last, trial_id)
        ended = trial.state.is_finished()
        (self._open.discard if ended else self._open.add)(trial.number)
        (self._stale.discard if ended or self._alone else self._stale.add)(trial_id)
