"""The study as every process may read it, and what any terminal may leave in it. Takes no lock."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any, Self

from optuna.trial import FrozenTrial
from sqlalchemy import Connection

from orchestrator.errors import StorageRefused, StudyMissing
from orchestrator.folders import SweepFolder
from orchestrator.spec.sweep_spec import SweepSpec
from orchestrator.study.database import optuna_trials
from orchestrator.study.database.enqueued_trials import Given, Queue
from orchestrator.study.database.optuna_trials import MICRO_BATCH, Remembered
from orchestrator.study.database.repository import Ledger
from orchestrator.study.database.study_database import Store, is_made, location
from orchestrator.study.database.tables import FIRST_NAMED_SO, SCHEMA
from orchestrator.study.sweep_terms import SETTLED, Settled, Spent
from orchestrator.study.trial_records import (
    DRIVER,
    PAUSED,
    STOPPING,
    UNPAUSED,
    Event,
    Fork,
    Request,
    SpecVersion,
    TrialRecord,
    front,
    ranking,
)
from orchestrator.study.trial_snapshots import Known
from trainer.results import Point


class StudyReader:
    """One sweep's truth, read. `Study` adds the driving."""

    def __init__(self, folder: SweepFolder, store: Store) -> None:
        self.folder = folder
        self._store = store
        self._ledger = Ledger(folder.name)
        self._queue = Queue(folder.name)
        with store.reading() as c:
            identity = self._ledger.identity(c)
            versions = self._ledger.spec_versions(c)
            kept = {} if identity is None else store.storage.get_study_user_attrs(identity.study_id)
        if identity is None:
            raise StudyMissing(store.url)
        if identity.schema > SCHEMA:
            raise StorageRefused(f"the study in {store.url} was written by a later version of this program")
        if identity.schema < FIRST_NAMED_SO:
            raise StorageRefused(
                f"the study in {store.url} was written by an earlier version of this program, which named trials "
                "differently; look at it and finish it with that version"
            )
        if identity.schema < SCHEMA:
            store.upgrade()
        self.id: str = identity.id
        """Unique to this sweep for ever, also when its name is used again elsewhere."""
        self._study_id = identity.study_id
        self._remembered = Remembered(store.storage, identity.study_id)
        store.undone = self._remembered.forget
        self.settled = Settled.from_json(kept[SETTLED]) if SETTLED in kept else Settled()
        self.spec = SweepSpec.model_validate_json(versions[-1].text)

    # --- opening -------------------------------------------------------------------------------------------------

    @staticmethod
    def exists(folder: SweepFolder) -> bool:
        """Whether this folder's sweep has a study, here or in another database; one half made is none."""
        return is_made(location(folder), folder.name)

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

    # --- reading -------------------------------------------------------------------------------------------------

    def trials(self) -> list[TrialRecord]:
        """Every trial issued so far, by number."""
        with self._store.reading() as c:
            progress, seconds = self._ledger.progress(c), self._ledger.trial_seconds(c)
            frozen = self._frozen()
        order = self.spec.search.paths
        return [
            optuna_trials.record(t, *progress.get(t.number, (0, {})), order, seconds.get(t.number, 0.0)) for t in frozen
        ]

    def trial(self, number: int) -> TrialRecord | None:
        """One trial; None where it was not issued yet."""
        with self._store.reading() as c:
            frozen = self._frozen()
            return self._record(c, frozen[number]) if number < len(frozen) else None

    def known(self) -> list[Known]:
        """Every trial as samplers and pruners see it."""
        with self._store.reading():
            return self._remembered.known()

    def points(self, number: int) -> list[Point]:
        """Every point of a trial, by step."""
        with self._store.reading() as c:
            return self._ledger.points(c, number)

    def best(self) -> TrialRecord | None:
        """The complete trial with the best value of the goal; with several goals, the first of the Pareto front."""
        return next(iter(ranking(self.trials(), *self.spec.goals)), None)

    def front(self) -> list[TrialRecord]:
        """The complete trials that no other one beats in every goal; with one goal, the best."""
        return front(self.trials(), self.spec.goals)

    def events(self, after: int = 0) -> list[Event]:
        """What happened, in order, after event number `after`."""
        with self._store.reading() as c:
            return self._ledger.events(c, after)

    def consecutive_bugs(self) -> tuple[int, str]:
        """How many of the trials that ended last ended in the very same BUG, and its text."""
        with self._store.reading():
            return optuna_trials.consecutive_bugs(self._frozen())

    def learned_micro_batch(self) -> int | None:
        """The most tokens of a micro-batch that memory was found to hold; None while none ran out."""
        with self._store.reading():
            return self._learned()

    def spent(self) -> Spent:
        """Working time of all drivers of this sweep, and GPU time of all attempts."""
        with self._store.reading() as c:
            return self._spent(c)

    def paused(self) -> str:
        """Why the sweep as a whole is paused, in words; empty while it is not."""
        with self._store.reading() as c:
            last = self._ledger.last_event(c, (DRIVER, PAUSED, UNPAUSED))
        return last.text if last is not None and last.kind == PAUSED else ""

    def stopped(self) -> str:
        """How its last driver came to an end, in words; empty while one begins anew or the sweep is finished."""
        with self._store.reading() as c:
            last = self._ledger.last_event(c, (DRIVER, STOPPING))
        return last.text if last is not None and last.kind == STOPPING else ""

    def spec_history(self) -> list[SpecVersion]:
        """Every spec this sweep ran under, the first one first."""
        with self._store.reading() as c:
            return self._ledger.spec_versions(c)

    def judged(self) -> list[str]:
        """Every judge's verdict on a trial, as the JSON that `keep_judged` was given; by trial and key."""
        with self._store.reading() as c:
            return self._ledger.judged(c)

    # --- from any terminal ---------------------------------------------------------------------------------------

    def note(self, kind: str, text: str, trial: int | None = None) -> int:
        """Remember that something happened; returns its number in the order."""
        with self._writing() as c:
            return self._ledger.add_event(c, kind, text, trial)

    def give(
        self,
        leaves: Mapping[str, Any],
        origin: str,
        *,
        kind: str,
        parent: int | None = None,
        fork: Fork | None = None,
    ) -> Given:
        """Queue a trial by hand: it runs next, before what the sampler draws and on top of `budget.trials`.

        `leaves` are a trial's over the base, checked by `orchestrator.spec.search.manual_trials`; `origin` says who and
        why; `fork` is the checkpoint of `parent` that it goes on from.
        """
        with self._writing() as c:
            seq = self._queue.add(c, leaves, origin, by_hand=True, parent=parent, fork=fork)
            self._ledger.add_event(c, kind, origin, parent)
            return next(g for g in self._queue.all(c) if g.seq == seq)

    def given(self) -> list[Given]:
        """Every trial given by people: waiting ones have no number yet."""
        with self._store.reading() as c:
            return self._queue.all(c)

    def keep_judged(self, trial: int, key: str, verdict: str) -> None:
        """Remember a judge's verdict on a trial; an older one of the same key is replaced."""
        with self._writing() as c:
            self._ledger.set_judged(c, trial, key, verdict)

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

    def _frozen(self) -> list[FrozenTrial]:
        return self._remembered.trials()

    def _learned(self) -> int | None:
        by_sft = self._remembered.study_attrs().get(MICRO_BATCH)
        by_trials = optuna_trials.learned_micro_batch(self._frozen())
        return min((tokens for tokens in (by_sft, by_trials) if tokens is not None), default=None)

    def _record(self, c: Connection, frozen: FrozenTrial) -> TrialRecord:
        progress = self._ledger.progress_of(c, frozen.number)
        seconds = self._ledger.seconds_of_trial(c, frozen.number)
        return optuna_trials.record(frozen, *progress, self.spec.search.paths, seconds)

    def _spent(self, c: Connection) -> Spent:
        return Spent(self._ledger.seconds(c) / 3600, self._ledger.gpu_seconds(c) / 3600)
