"""A study that this process drives: newer drivers fence it off, working time counts, and its spec may be amended."""

from __future__ import annotations

import functools
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress

from sqlalchemy import Connection

from orchestrator.errors import StorageRefused
from orchestrator.folders import SweepFolder
from orchestrator.spec.sweep import SweepSpec
from orchestrator.study import lease, specs
from orchestrator.study.driver import Driver
from orchestrator.study.heartbeat import Heartbeat
from orchestrator.study.issue import Issuer
from orchestrator.study.knowing import Known
from orchestrator.study.reader import StudyReader
from orchestrator.study.records import PAUSED, UNPAUSED
from orchestrator.study.specs import Change
from orchestrator.study.store import Store


class DrivenStudy(StudyReader):
    """One sweep's truth with the right to change it, taken by the first call that needs it."""

    def __init__(self, folder: SweepFolder, store: Store) -> None:
        super().__init__(folder, store)
        self._driver: Driver | None = None
        self._heart: Heartbeat | None = None
        self._gpus = 1.0
        self._take_spec(self.spec)

    def _take_spec(self, spec: SweepSpec) -> None:
        self.spec = spec
        self._issuer = Issuer(self._remembered, self._ledger, self._queue, spec, self.settled)

    def begin(self, gpus: float | None = None) -> None:
        """Drive from now on: older drivers' writes are refused and working time counts. Claiming does so by itself.

        `gpus` are those of a trial's slot; without any, slots are counted in their place. SweepHeld where another
        driver lives; one of another machine that says nothing for a minute does not.
        """
        if gpus is not None:
            self._gpus = gpus or 1.0
        with self._driving():
            pass

    def beat(self) -> None:
        """Called now and then while waiting: SweepHeld where another driver has taken over meanwhile."""
        if self._driver is not None and (self._driver.fenced or self._driver.silent >= lease.BEAT):
            self.begin()

    @property
    def fenced(self) -> bool:
        """Whether another driver has taken over from this one, which has noticed."""
        return self._driver is not None and self._driver.fenced

    def check_fence(self) -> None:
        """SweepHeld where another driver has taken over from this one; for what is told elsewhere than in the study.

        From any thread. The database is asked only where this driver was silent for so long that it may be.
        """
        driver = self._driver
        if driver is not None and (driver.fenced or driver.silent >= lease.PATIENCE / 2):
            with self._store.beside() as c:
                driver.still_mine(c)

    def dispose(self) -> None:
        """Leave the study to the next driver and give the database connections back. Held trials stay RUNNING."""
        if self._heart is not None:
            self._heart.end()
            self._heart = None
        if self._driver is not None:
            # What the database refuses here is only a courtesy: the next driver sees that this process has ended.
            with suppress(StorageRefused), self._store.writing() as c:
                self._driver.leave(c)
            self._driver = None
        super().dispose()

    def rest(self, why: str) -> None:
        """The whole sweep is paused: no working time counts until `wake`."""
        with self._driving() as c:
            self._ledger.add_event(c, PAUSED, why, None)
        assert self._driver is not None
        self._driver.rest()

    def wake(self, why: str) -> None:
        """It goes on."""
        assert self._driver is not None
        self._driver.wake()
        with self._driving() as c:
            self._ledger.add_event(c, UNPAUSED, why, None)

    # --- the spec ------------------------------------------------------------------------------------------------

    def admit(self, slots: int) -> None:
        """TooManySlots where so many trials at a time are more than this sweep's rule of knowing allows."""
        self.settled.admit(self.spec, slots)

    def exhausted(self) -> str:
        """Why no new trial will be issued, in words; empty while there is one to come."""
        with self._store.reading() as c:
            return self._limit(c, self._remembered.known())

    def tried(self) -> str:
        """Why there is nothing left to try, however much time there is, in words; empty while there is."""
        with self._store.reading() as c:
            return self._issuer.tried(c, self._remembered.known())

    def amend(self, spec: SweepSpec) -> list[Change]:
        """Continue under another spec: budget, resources and the like may change, what makes trials comparable may not.

        Returns the leaves that changed; the old spec stays in the history.
        """
        changed = specs.changes(self.spec, spec)
        if changed:
            with self._driving() as c:
                self._ledger.add_spec(c, spec.model_dump_json(), specs.digest(spec))
                self._ledger.add_event(c, "spec", "; ".join(map(str, changed)), None)
            self._take_spec(spec)
        return changed

    # --- inside --------------------------------------------------------------------------------------------------

    @contextmanager
    def _driving(self) -> Generator[Connection]:
        if self._driver is None:
            Driver.await_turn(self._ledger, self._store.reading)
            with self._store.writing() as c:
                driver = Driver.begin(self._ledger, c)
            self._driver, self._heart = driver, Heartbeat(functools.partial(self._show_life, driver))
            self._remembered.alone()
        with self._store.writing() as c:
            self._driver.still_mine(c)
            yield c

    @contextmanager
    def _writing(self) -> Generator[Connection]:
        """A driver's notes and answers to requests are refused too once another one has taken over."""
        with super()._writing() if self._driver is None else self._driving() as c:
            yield c

    def _show_life(self, driver: Driver) -> None:
        with self._store.beside() as c:
            driver.beat(c)

    def _limit(self, c: Connection, trials: Sequence[Known]) -> str:
        return self._issuer.limit(c, trials, lambda: self._spent(c))
