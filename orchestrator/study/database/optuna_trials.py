"""`OptunaTrials`: cached reads and writes of Optuna's trials, and their conversion to `TrialRecord`.

A finished trial is read once; the driver's own writes update the cache.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from optuna.distributions import BaseDistribution
from optuna.storages import RDBStorage
from optuna.storages._rdb.models import (  # tables without a public name
    TrialIntermediateValueModel,
    TrialModel,
    TrialSystemAttributeModel,
)
from optuna.study._constrained_optimization import _CONSTRAINTS_KEY  # pyright: ignore[reportPrivateUsage]
from optuna.trial import FrozenTrial
from optuna.trial import TrialState as OptunaState
from sqlalchemy import Connection, delete, insert, update

from orchestrator.study.trial_records import FailedAttempt, FailureKind, Fork, TrialRecord, TrialState
from orchestrator.study.trial_snapshots import PastFailure, TrialSnapshot

TO_OPTUNA = {
    TrialState.RUNNING: OptunaState.RUNNING,
    TrialState.COMPLETE: OptunaState.COMPLETE,
    TrialState.PRUNED: OptunaState.PRUNED,
    TrialState.FAILED: OptunaState.FAIL,
}
FROM_OPTUNA = {optuna_state: state for state, optuna_state in TO_OPTUNA.items()}

# Keys of a trial's user attributes.
FINGERPRINT = "identity"
ATTEMPTS = "attempts"
STARTED = "started_at"
PAUSE_REASON = "paused"
"""Why a trial is paused; empty or absent if it is not."""
OUTCOME = "outcome"
"""How a trial ended; empty or absent while it has not, also after a failure that is retried."""
FAILURES = "failures"
"""Failures after which a trial was retried, each with `attempt`, `reason`, `step`, `trials` (issued before the retry)
and `curve` (the pruner's metric by update).
"""
VALUES = "values"
SAMPLER_NOTE = "note"
UPDATES = "updates"
REQUESTED_OUTCOME = "asked"
MICRO_BATCH = "micro_batch"
ENQUEUED_ATTR = "given"
"""Of an enqueued trial: `leaves` (settings over the base), `params` (all), `origin`, `by_hand`, `parent` and `fork`
(`step` and `place`, or None); of a finalist also `finalist`, the first trial of its configuration. Optuna's own params
of it are those inside the search space.
"""


PARAMS = "params"
"""All params of a sampled trial if Optuna's distributions cannot hold some: they are outside of the search space, or
their list of values has grown since the sweep began.

The staged sampler also starts from and returns to values of `base` or of an enqueued trial.
"""


def to_record(
    trial: FrozenTrial, step: int, metrics: dict[str, float], order: Sequence[str], seconds: float
) -> TrialRecord:
    """Return the record of a trial, with its params in the file's order."""
    attrs = trial.user_attrs
    ended: dict[str, Any] = attrs.get(OUTCOME, {})
    failure = ended.get("failure")
    values = tuple(trial.values) if trial.state is OptunaState.COMPLETE else None
    return TrialRecord(
        number=trial.number,
        state=TrialState.PAUSED if is_paused(trial) else FROM_OPTUNA[trial.state],
        params=trial_params(trial, order),
        attempts=attrs[ATTEMPTS],
        reason=ended.get("reason", attrs.get(PAUSE_REASON, "")),
        failure=None if failure is None else FailureKind(failure),
        diverged=ended.get("diverged", False),
        step=step,
        metrics=metrics,
        value=None if values is None else values[0],
        values=values,
        started_at=attrs[STARTED],
        finished_at=ended.get("finished_at"),
        seconds=seconds,
        origin=attrs.get(ENQUEUED_ATTR, {}).get("origin", ""),
        parent=attrs.get(ENQUEUED_ATTR, {}).get("parent"),
        fork=trial_fork(trial),
        by_command=bool(attrs.get(ENQUEUED_ATTR, {}).get("by_hand")),
        failed_attempts=tuple(FailedAttempt(f["attempt"], f["reason"], f["step"]) for f in attrs.get(FAILURES, ())),
        violations=trial.constraints,
        finalist_of=finalist_of(trial),
    )


def finalist_of(trial: FrozenTrial) -> int | None:
    """Return the first trial of the configuration that this finalist trains again; None for a trial of the search."""
    return trial.user_attrs.get(ENQUEUED_ATTR, {}).get("finalist")


def trial_fork(trial: FrozenTrial) -> Fork | None:
    """Return the checkpoint of another trial that this one continues from; None if there is none."""
    stored = trial.user_attrs.get(ENQUEUED_ATTR, {}).get("fork")
    return None if stored is None else Fork.from_json(stored)


def first_attempt(trial: FrozenTrial) -> int:
    """Return the first attempt since the trial was last retried after a failure."""
    failures = trial.user_attrs.get(FAILURES)
    return failures[-1]["attempt"] + 1 if failures else 1


def is_running(trial: FrozenTrial) -> bool:
    """Return whether the trial has begun and not ended."""
    return trial.state is OptunaState.RUNNING


def is_paused(trial: FrozenTrial) -> bool:
    """Return whether a user paused this trial."""
    return is_running(trial) and bool(trial.user_attrs.get(PAUSE_REASON))


def trial_params(trial: FrozenTrial, order: Sequence[str]) -> dict[str, Any]:
    """Return a trial's params in the file's order, then those of an enqueued trial that are not searched."""
    stored = _params(trial)
    listed = {path: stored[path] for path in order if path in stored}
    return listed | {path: value for path, value in stored.items() if path not in listed}


def _params(trial: FrozenTrial) -> dict[str, Any]:
    attrs = trial.user_attrs
    return attrs[ENQUEUED_ATTR]["params"] if ENQUEUED_ATTR in attrs else attrs.get(PARAMS, trial.params)


def to_snapshot(trial: FrozenTrial) -> TrialSnapshot:
    """Return the trial as samplers and pruners see it."""
    attrs = trial.user_attrs
    values = attrs.get(VALUES)
    return TrialSnapshot(
        number=trial.number,
        params=_params(trial),
        state=FROM_OPTUNA[trial.state],
        values=None if values is None else tuple(float(value) for value in values),
        curve={step: value for step, value in sorted(trial.intermediate_values.items()) if step > 0},
        diverged=attrs.get(OUTCOME, {}).get("diverged", False),
        updates=attrs.get(UPDATES),
        sampler_note=attrs.get(SAMPLER_NOTE, {}),
        is_enqueued=ENQUEUED_ATTR in attrs,
        by_command=bool(attrs.get(ENQUEUED_ATTR, {}).get("by_hand")) or finalist_of(trial) is not None,
        fingerprint=attrs[FINGERPRINT],
        is_fork=trial_fork(trial) is not None,
        failures=tuple(
            PastFailure(f["trials"], {int(step): value for step, value in f["curve"].items()})
            for f in attrs.get(FAILURES, ())
        ),
        violations=trial.constraints,
        finalist_of=finalist_of(trial),
    )


def micro_batch_limit(trials: Iterable[FrozenTrial]) -> int | None:
    """Return the smallest limit on tokens per micro-batch that out-of-memory errors have set; None without any.

    Limits of trials that ran out of memory anyway are ignored.
    """
    found = [
        limit for trial in trials if (limit := trial.user_attrs.get(MICRO_BATCH)) and not _failed_for_memory(trial)
    ]
    return min(found, default=None)


def _failed_for_memory(trial: FrozenTrial) -> bool:
    return trial.user_attrs.get(OUTCOME, {}).get("failure") == FailureKind.OUT_OF_MEMORY


def consecutive_bugs(trials: Iterable[FrozenTrial]) -> tuple[int, str]:
    """Return how many of the last ended trials failed with the same BUG in a row, and its text."""
    count, text = 0, ""
    for trial in reversed(by_end(trials)):
        outcome = trial.user_attrs[OUTCOME]
        if outcome["failure"] != FailureKind.BUG or (count and outcome["reason"] != text):
            break
        count, text = count + 1, outcome["reason"]
    return count, text


def by_end(trials: Iterable[FrozenTrial]) -> list[FrozenTrial]:
    """Return the ended trials in the order in which they ended."""
    return sorted((t for t in trials if t.user_attrs.get(OUTCOME)), key=lambda t: t.user_attrs[OUTCOME]["order"])


def _constraint(name: str) -> str:
    """Key among a trial's system attributes, as Optuna's `Trial.set_constraint` has it."""
    return f"{_CONSTRAINTS_KEY}:{name}"


class OptunaTrials:
    """All trials of a study: cached reads, and writes.

    A process that only reads reads unfinished, failed and new trials again each time; the driver, which is the only
    writer, only those that it changed. `invalidate` must be called after a failed transaction.
    """

    def __init__(self, storage: RDBStorage, study_id: int) -> None:
        self._storage, self._study_id = storage, study_id
        self._exclusive = False
        self._once: set[str] | None = None
        """What was read in the present `reading_once`."""
        self.invalidate()

    def invalidate(self) -> None:
        """Drop the cache: the next call reads everything again."""
        self._trials: list[FrozenTrial] = []
        self._ids: dict[int, int] = {}
        self._stale: set[int] = set()
        self._more = True
        self._last = -1
        self._open: set[int] = set()
        self._snapshots: list[TrialSnapshot] = []
        self._distributions: dict[str, BaseDistribution] = {}
        self._attrs: dict[str, Any] | None = None
        if self._once is not None:
            self._once.clear()

    @contextmanager
    def reading_once(self) -> Generator[None]:
        """Read everything in the context at most once: it is inside one transaction, and nothing is written."""
        outer = self._once
        if outer is None:
            self._once = set[str]()
        try:
            yield
        finally:
            self._once = outer

    def _must_read(self, what: str) -> bool:
        """Return whether this is not known from the transaction that `reading_once` is in."""
        if self._once is None:
            return True
        is_new = what not in self._once
        self._once.add(what)
        return is_new

    def set_exclusive(self) -> None:
        """Trust the cache from now on: this process is the only writer, as it holds the driver's lease."""
        self.invalidate()
        self._exclusive = True

    # --- reading -------------------------------------------------------------------------------------------------

    def trials(self) -> list[FrozenTrial]:
        """Return every trial by number, as the open transaction sees them. Callers must not change them."""
        if self._must_read("trials") and (self._more or self._stale or not self._exclusive):
            read = self._storage._get_trials(  # pyright: ignore[reportPrivateUsage]  what Optuna's own cache reads with
                self._study_id, None, included_trial_ids=set(self._stale), trial_id_greater_than=self._last
            )
            for trial in read:
                self._put(trial)
            self._more = False
        return list(self._trials)

    def unfinished(self) -> list[FrozenTrial]:
        """Return the trials that have not ended, by number."""
        self.trials()
        return [self._trials[number] for number in sorted(self._open)]

    def snapshots(self) -> list[TrialSnapshot]:
        """Return every trial as samplers and pruners see it."""
        for trial in self.unfinished():
            self._snapshots[trial.number] = to_snapshot(trial)
        return list(self._snapshots)

    def trial(self, trial_id: int) -> FrozenTrial:
        """Return a trial by Optuna's id."""
        return self.trials()[self._ids[trial_id]]

    def distributions(self) -> Mapping[str, BaseDistribution]:
        """Return each path's distribution in the first trial that has it."""
        self.trials()
        return self._distributions

    def study_attrs(self) -> Mapping[str, Any]:
        """Return the user attributes of the study."""
        if self._must_read("attrs") and (self._attrs is None or not self._exclusive):
            self._attrs = self._storage.get_study_user_attrs(self._study_id)
        assert self._attrs is not None
        return self._attrs

    def optuna_id(self, number: int) -> int:
        """Return Optuna's id of a trial that was read."""
        return self._trials[number]._trial_id  # pyright: ignore[reportPrivateUsage]

    # --- writing, inside a transaction ---------------------------------------------------------------------------

    def create(self, template: FrozenTrial) -> int:
        """Create a trial; return Optuna's id."""
        self._more = True
        return self._storage.create_new_trial(self._study_id, template)

    def set(self, trial_id: int, key: str, value: Any) -> None:
        """Set a user attribute of an unfinished trial."""
        self._storage.set_trial_user_attr(trial_id, key, value)
        if (trial := self._cached(trial_id)) is not None:
            trial.user_attrs[key] = json.loads(json.dumps(value))  # as the database returns it

    def add_intermediate(self, trial_id: int, step: int, value: float) -> None:
        """Store the pruner's metric of an unfinished trial at one update."""
        self._storage.set_trial_intermediate_value(trial_id, step, value)
        if (trial := self._cached(trial_id)) is not None:
            trial.intermediate_values[step] = value

    def finish(
        self, trial_id: int, state: OptunaState, values: Sequence[float] | None, violations: Mapping[str, float]
    ) -> None:
        """Set a trial's final state and values, and its constraints as Optuna's `Trial.set_constraint` does."""
        for name, violation in violations.items():
            self._storage.set_trial_system_attr(trial_id, _constraint(name), violation)
        self._storage.set_trial_state_values(trial_id, state, values)
        self._stale.add(trial_id)

    def measure_again(self, connection: Connection, violations_of: Callable[[int], Mapping[str, float]]) -> None:
        """Replace the constraints of every ended trial with values; `violations_of`: those of a trial by its number.

        Optuna itself changes no ended trial.
        """
        table = TrialSystemAttributeModel.__table__
        for trial in self.trials():
            if VALUES not in trial.user_attrs or FROM_OPTUNA[trial.state] not in (
                TrialState.COMPLETE,
                TrialState.PRUNED,
            ):
                continue
            if trial.user_attrs[OUTCOME]["diverged"]:
                continue
            trial_id = self.optuna_id(trial.number)
            own = table.c.trial_id == trial_id
            connection.execute(delete(table).where(own, table.c.key.startswith(_constraint(""), autoescape=True)))
            rows = [
                {"trial_id": trial_id, "key": _constraint(name), "value_json": json.dumps(violation)}
                for name, violation in violations_of(trial.number).items()
            ]
            if rows:
                connection.execute(insert(table), rows)
            self._stale.add(trial_id)

    def reopen(self, connection: Connection, trial_id: int) -> None:
        """Make a failed trial RUNNING again, without its intermediate values. Optuna itself changes no ended trial."""
        trials, values = TrialModel.__table__, TrialIntermediateValueModel.__table__
        connection.execute(delete(values).where(values.c.trial_id == trial_id))
        row = {"state": OptunaState.RUNNING, "datetime_complete": None}
        connection.execute(update(trials).where(trials.c.trial_id == trial_id).values(row))
        self._stale.add(trial_id)

    def set_study(self, key: str, value: Any) -> None:
        """Set a user attribute of the study."""
        self._storage.set_study_user_attr(self._study_id, key, value)
        self._attrs = None

    # --- inside --------------------------------------------------------------------------------------------------

    def _cached(self, trial_id: int) -> FrozenTrial | None:
        """Return the cached trial; None if it is not cached or will be read again."""
        if trial_id in self._stale or trial_id not in self._ids:
            return None
        return self._trials[self._ids[trial_id]]

    def _put(self, trial: FrozenTrial) -> None:
        trial_id = trial._trial_id  # pyright: ignore[reportPrivateUsage]
        if trial.number == len(self._trials):
            self._trials.append(trial)
            self._distributions = trial.distributions | self._distributions
            self._snapshots.append(to_snapshot(trial))
            self._ids[trial_id] = trial.number
        else:
            self._trials[trial.number] = trial
            self._snapshots[trial.number] = to_snapshot(trial)
        self._last = max(self._last, trial_id)
        ended = trial.state.is_finished()
        (self._open.discard if ended else self._open.add)(trial.number)
        final = ended and trial.state is not OptunaState.FAIL  # a failed trial may be retried by the driver
        (self._stale.discard if final or self._exclusive else self._stale.add)(trial_id)
