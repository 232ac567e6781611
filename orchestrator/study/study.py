"""The study: claim, observe, close. Everything else in the house can be lost and made again from it."""

from __future__ import annotations

import time
import uuid
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

from optuna.exceptions import DuplicatedStudyError
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial
from sqlalchemy import Connection, insert

from orchestrator.errors import NameTaken, StorageRefused
from orchestrator.folders import SweepFolder
from orchestrator.spec.sweep import SweepSpec
from orchestrator.study import reading, specs
from orchestrator.study.driver import Driver
from orchestrator.study.ending import outcome_to_json, settle
from orchestrator.study.errors import NotHeld, StudyMissing, TrialFinished
from orchestrator.study.guard import as_number, judge
from orchestrator.study.issue import Issuer
from orchestrator.study.ledger import Ledger
from orchestrator.study.ranking import ranking
from orchestrator.study.reading import ASKED, OUTCOME, SECONDS, STARTED, TO_OPTUNA
from orchestrator.study.records import Event, Request, SpecVersion, Trial, TrialRecord
from orchestrator.study.state import Outcome, TrialState
from orchestrator.study.store import Store, choose_location, has_location, location, remember_location
from orchestrator.study.tables import SCHEMA, SWEEP
from trainer.report import Point, Verdict


@dataclass(frozen=True, slots=True)
class _Held:
    """A trial this process has issued and not yet closed or released."""

    attempt: int
    trial_id: int
    since: float


class Study:
    """One sweep's truth. Reading takes no lock and is open to every process; the first claim makes this the driver."""

    def __init__(self, folder: SweepFolder, store: Store) -> None:
        self.folder = folder
        self._store = store
        self._ledger = Ledger(folder.name)
        self._driver: Driver | None = None
        self._held: dict[int, _Held] = {}
        with store.reading() as c:
            identity = self._ledger.identity(c)
            versions = self._ledger.spec_versions(c)
        if identity is None:
            raise StudyMissing(store.url)
        if identity.schema > SCHEMA:
            raise StorageRefused(f"the study in {store.url} was written by a later version of this program")
        self.id: str = identity.id
        """Unique to this sweep for ever, also when its name is used again elsewhere."""
        self._study_id = identity.study_id
        self._take_spec(SweepSpec.model_validate_json(versions[-1].text))

    def _take_spec(self, spec: SweepSpec) -> None:
        self.spec = spec
        self._issuer = Issuer(self._store, self._ledger, self._study_id, spec)

    # --- opening -------------------------------------------------------------------------------------------------

    @classmethod
    def create(cls, folder: SweepFolder, spec: SweepSpec, storage: str | None = None) -> Self:
        """A new study in `storage` (an SQLAlchemy URL without password); by default the spec's, else SQLite here."""
        storage = storage or spec.storage
        folder.path.mkdir(parents=True, exist_ok=True)
        store = Store(choose_location(folder, storage), create=True)
        if storage is not None:
            remember_location(folder, storage)
        ledger = Ledger(folder.name)
        direction = StudyDirection[spec.goal.direction.upper()]
        try:
            with store.writing() as c:
                if ledger.identity(c) is not None:
                    raise NameTaken(folder.name, folder.path)
                study_id = store.storage.create_new_study([direction], folder.name)
                row = {"id": uuid.uuid4().hex, "schema": SCHEMA, "study_id": study_id, "driver": 0}
                c.execute(insert(SWEEP).values(sweep=folder.name, created_at=time.time(), **row))
                ledger.add_spec(c, spec.model_dump_json(), specs.digest(spec))
                ledger.add_event(c, "created", f"sweep {folder.name}", None)
        except DuplicatedStudyError:
            raise NameTaken(folder.name, folder.path) from None
        return cls(folder, store)

    def begin(self) -> None:
        """Drive from now on: older drivers' writes are refused and working time counts. Claiming does so by itself."""
        with self._driving():
            pass

    @staticmethod
    def exists(folder: SweepFolder) -> bool:
        """Whether this folder's sweep has a study, here or in another database."""
        return folder.database.exists() or has_location(folder)

    @classmethod
    def open(cls, folder: SweepFolder) -> Self:
        """The study of a sweep that exists; changes nothing."""
        return cls(folder, Store(location(folder)))

    def dispose(self) -> None:
        """Give the database connections back. Held trials stay RUNNING."""
        self._store.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.dispose()

    # --- driving -------------------------------------------------------------------------------------------------

    def claim(self) -> Trial | None:
        """The next trial to run: first those a dead or interrupted driver left, then new ones; None: nothing is left.

        None comes when the budget is spent or the space exhausted; `exhausted` says which.
        """
        with self._driving() as c:
            trials = self._frozen()
            orphan = next(
                (t for t in trials if t.state is TO_OPTUNA[TrialState.RUNNING] and t.number not in self._held), None
            )
            if orphan is not None:
                issued = self._issuer.again(c, orphan)
            else:
                issued = None if self._limit(c, len(trials)) else self._issuer.new(c, trials)
        if issued is None:
            return None
        trial, trial_id = issued
        self._held[trial.number] = _Held(trial.attempt, trial_id, time.monotonic())
        return trial

    def reissue(self, trial: Trial) -> Trial:
        """The worker of this trial is lost: the same trial, next attempt. The old attempt can write no more."""
        with self._driving() as c:
            held = self._hold(trial, "another attempt")
            self._add_seconds(held)
            again, _ = self._issuer.again(c, self._store.storage.get_trial(held.trial_id))
        self._held[trial.number] = _Held(again.attempt, held.trial_id, time.monotonic())
        return again

    def observe(self, trial: Trial, points: Sequence[Point]) -> Verdict:
        """Keep points that are new by their step, and say whether to go on. A step told twice counts once."""
        with self._driving() as c:
            held = self._hold(trial, "points")
            known = self._ledger.known_steps(c, trial.number, [p.step for p in points])
            fresh = {p.step: p for p in reversed(points) if p.step not in known}
            if fresh:
                self._ledger.add_points(c, trial.number, list(fresh.values()))
            for step, point in fresh.items():
                if (value := point.metrics.get(self.spec.goal.metric)) is not None:
                    self._store.storage.set_trial_intermediate_value(held.trial_id, step, as_number(value))
        return judge(points)

    def close(self, trial: Trial, outcome: Outcome) -> TrialRecord:
        """End the trial for good; the record says how it ended. The same again changes nothing, another is refused."""
        asked = outcome_to_json(outcome)
        with self._driving() as c:
            frozen = self._find(trial.number)
            if frozen is not None and frozen.user_attrs.get(ASKED) == asked:
                return self._record(c, frozen)
            held = self._hold(trial, f"closing it as {outcome.state}")
            frozen = self._store.storage.get_trial(held.trial_id)
            final, value = settle(outcome, reading.goal_value(frozen), self.spec.goal)
            order = self._ledger.add_event(c, final.state.lower(), final.reason, trial.number)
            finished = max(time.time(), frozen.user_attrs[STARTED])
            self._add_seconds(held)
            self._set(held.trial_id, ASKED, asked)
            ended = outcome_to_json(final) | {"order": order, "finished_at": finished}
            self._set(held.trial_id, OUTCOME, ended)
            values = None if value is None else [value]
            self._store.storage.set_trial_state_values(held.trial_id, TO_OPTUNA[final.state], values)
            record = self._record(c, self._store.storage.get_trial(held.trial_id))
        del self._held[trial.number]
        return record

    def release(self, trial: Trial) -> None:
        """The trial is interrupted, not ended: it stays RUNNING and is issued again by a later claim."""
        with self._driving() as c:
            held = self._hold(trial, "releasing it")
            self._add_seconds(held)
            self._ledger.add_event(c, "released", f"attempt {trial.attempt} interrupted", trial.number)
        del self._held[trial.number]

    def exhausted(self) -> str:
        """Why no new trial will be issued, in words; empty while there is one to come."""
        with self._store.reading() as c:
            return self._limit(c, len(self._frozen()))

    def amend(self, spec: SweepSpec) -> list[str]:
        """Continue under another spec: budget, resources and the like may change, what makes trials comparable may not.

        Returns the leaves that changed; the old spec stays in the history.
        """
        changed = specs.changes(self.spec, spec)
        if changed:
            with self._driving() as c:
                self._ledger.add_spec(c, spec.model_dump_json(), specs.digest(spec))
                self._ledger.add_event(c, "spec", "changed: " + ", ".join(changed), None)
            self._take_spec(spec)
        return changed

    # --- reading -------------------------------------------------------------------------------------------------

    def trials(self) -> list[TrialRecord]:
        """Every trial issued so far, by number."""
        with self._store.reading() as c:
            progress = self._ledger.progress(c)
            frozen = self._frozen()
        order = self.spec.search.paths
        return [reading.record(t, *progress.get(t.number, (0, {})), order) for t in frozen]

    def points(self, number: int) -> list[Point]:
        """Every point of a trial, by step."""
        with self._store.reading() as c:
            return self._ledger.points(c, number)

    def best(self) -> TrialRecord | None:
        """The complete trial with the best value of the goal."""
        return next(iter(ranking(self.trials(), self.spec.goal)), None)

    def events(self, after: int = 0) -> list[Event]:
        """What happened, in order, after event number `after`."""
        with self._store.reading() as c:
            return self._ledger.events(c, after)

    def consecutive_bugs(self) -> tuple[int, str]:
        """How many of the trials that ended last ended in the very same BUG, and its text."""
        with self._store.reading():
            return reading.consecutive_bugs(self._frozen())

    def elapsed_hours(self) -> float:
        """Working time of all drivers of this sweep."""
        with self._store.reading() as c:
            return self._seconds(c) / 3600

    def spec_history(self) -> list[SpecVersion]:
        """Every spec this sweep ran under, the first one first."""
        with self._store.reading() as c:
            return self._ledger.spec_versions(c)

    # --- from any terminal ---------------------------------------------------------------------------------------

    def note(self, kind: str, text: str, trial: int | None = None) -> int:
        """Remember that something happened; returns its number in the order."""
        with self._writing() as c:
            return self._ledger.add_event(c, kind, text, trial)

    def request(self, kind: str, text: str = "", trial: int | None = None) -> int:
        """Ask the driver for something; returns the request's number."""
        with self._writing() as c:
            return self._ledger.add_request(c, kind, text, trial)

    def requests(self) -> list[Request]:
        """What was asked and is not yet done, oldest first."""
        with self._store.reading() as c:
            return self._ledger.requests(c)

    def done(self, seq: int) -> None:
        """That request is dealt with."""
        with self._writing() as c:
            self._ledger.done(c, seq)

    # --- inside --------------------------------------------------------------------------------------------------

    @contextmanager
    def _writing(self) -> Generator[Connection]:
        with self._store.writing() as c:
            self._ledger.identity(c, lock=True)
            yield c

    @contextmanager
    def _driving(self) -> Generator[Connection]:
        if self._driver is None:
            with self._store.writing() as c:
                driver = Driver.begin(self._ledger, c)
            self._driver = driver
        with self._store.writing() as c:
            self._driver.still_mine(c)
            yield c

    def _frozen(self) -> list[FrozenTrial]:
        return self._store.storage.get_all_trials(self._study_id, deepcopy=False)

    def _find(self, number: int) -> FrozenTrial | None:
        return next((t for t in self._frozen() if t.number == number), None)

    def _record(self, c: Connection, frozen: FrozenTrial) -> TrialRecord:
        progress = self._ledger.progress(c).get(frozen.number, (0, {}))
        return reading.record(frozen, *progress, self.spec.search.paths)

    def _set(self, trial_id: int, key: str, value: object) -> None:
        self._store.storage.set_trial_user_attr(trial_id, key, value)

    def _hold(self, trial: Trial, asked: str) -> _Held:
        held = self._held.get(trial.number)
        if held is not None and held.attempt == trial.attempt:
            return held
        frozen = self._find(trial.number)
        if frozen is not None and frozen.state.is_finished():
            raise TrialFinished(trial.number, reading.FROM_OPTUNA[frozen.state], asked)
        raise NotHeld(trial.number, trial.attempt, None if held is None else held.attempt)

    def _add_seconds(self, held: _Held) -> None:
        frozen = self._store.storage.get_trial(held.trial_id)
        self._set(held.trial_id, SECONDS, frozen.user_attrs[SECONDS] + time.monotonic() - held.since)

    def _seconds(self, c: Connection) -> float:
        return self._ledger.seconds(c) if self._driver is None else self._driver.seconds_of_all(c)

    def _limit(self, c: Connection, issued: int) -> str:
        return self._issuer.limit(issued, self._seconds(c))
