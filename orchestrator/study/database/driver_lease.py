"""`DriverLease`: the driver's right to write to a study, with fencing token, heartbeat and working time.

Whether a driver is alive is read from its process where this machine can see it, else from its heartbeat. Liveness
needs no wall clock: each driver increments a heartbeat counter and its working time; a waiting process checks whether
either increases. The heartbeat continues while the driver waits for a pause, a long evaluation or a slow mirror.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager

from sqlalchemy import Connection

from orchestrator.errors import StorageRefused, SweepHeld
from orchestrator.study.database.process_identity import (
    has_ended,
    holder_name,
    is_alive_here,
    is_stopped,
    process_id,
)
from orchestrator.study.database.repository import SweepRepository
from orchestrator.study.trial_records import DRIVER_EVENT, LAPSED_EVENT, RequestKind

HEARTBEAT_SECONDS = 10.0
"""Seconds between a driver's heartbeats."""
SILENCE_TIMEOUT = 60.0
"""Seconds without a heartbeat after which a driver on another machine has lost its lease."""
_POLL_SECONDS = 0.5


def clock() -> float:
    """Return monotonic seconds, including the machine's sleep where the system has such a clock."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


def watch_heartbeat(counters: Callable[[], tuple[float, int] | None], timeout: float) -> bool:
    """Watch a driver's heartbeat for up to `timeout` seconds.

    `counters` returns its working time and number of heartbeats, None after it released the lease. Returns False as
    soon as one of them grows, True if neither does or the lease is released.
    """
    before, until = counters(), time.monotonic() + timeout
    while before is not None and time.monotonic() < until:
        time.sleep(_POLL_SECONDS)
        now = counters()
        if now is None:
            break
        if now != before:
            return False
    return True


EXTENDING_REQUESTS = (RequestKind.RETRY, RequestKind.SET)
"""Requests that may give a driver more to do, so that it answers them before it ends."""
EXPIRING_REQUESTS = (RequestKind.STOP, RequestKind.PAUSE, RequestKind.UNPAUSE, RequestKind.ABANDON)
"""For the whole sweep these are for the driver that runs at that moment, not for one that resumes later."""


class DriverLease:
    """A driver's lease on a study, identified by a fencing token: writes under an older token are refused."""

    def __init__(self, repository: SweepRepository, token: int) -> None:
        self._repository, self._token = repository, token
        self._began, self._last_write = time.monotonic(), clock()
        self._paused_since: float | None = None
        self.fenced = False
        """Whether a write was refused because a newer driver took over."""

    @classmethod
    def acquire(cls, repository: SweepRepository, connection: Connection) -> DriverLease:
        """Acquire the lease with a new fencing token. Unanswered requests to stop or pause the whole sweep expire."""
        repository.sweep_row(connection, lock=True)
        name = process_id()
        driver = cls(repository, repository.add_driver(connection, name))
        repository.add_event(connection, DRIVER_EVENT, f"{holder_name(name)} drives", None)
        for request in repository.requests(connection):
            if request.trial is None and request.kind in EXPIRING_REQUESTS:
                repository.complete_request(connection, request.seq)
                repository.add_event(
                    connection, LAPSED_EVENT, f"a request to {request.kind} lapsed: {request.text}", None
                )
        return driver

    @staticmethod
    def wait_for_release(
        repository: SweepRepository, reading: Callable[[], AbstractContextManager[Connection]]
    ) -> None:
        """Wait up to SILENCE_TIMEOUT until no driver is alive. Raises SweepHeld, which names a driver that still is.

        A driver of this machine holds the lease while its process runs; one of another machine loses it after
        SILENCE_TIMEOUT seconds without a heartbeat.
        """
        with reading() as connection:
            row = repository.sweep_row(connection)
            holder = repository.holder(connection, row.driver) if row is not None and row.driver else ""
        if row is None or not holder or has_ended(holder):
            return
        if is_alive_here(holder):
            raise SweepHeld(repository.sweep, holder_name(holder), stopped=is_stopped(holder))

        def counters() -> tuple[float, int] | None:
            with reading() as connection:
                now = repository.sweep_row(connection)
                return repository.heartbeat_counters(connection, row.driver) if now is not None and now.driver else None

        if not watch_heartbeat(counters, SILENCE_TIMEOUT):
            raise SweepHeld(repository.sweep, holder_name(holder))

    def release(self, connection: Connection) -> None:
        """Release the lease, so that the next driver need not wait. Does nothing if a newer driver has it."""
        self._repository.release_driver(connection, self._token)

    @property
    def working_seconds(self) -> float:
        """Seconds since the lease was acquired, without pauses of the whole sweep."""
        return (self._paused_since or time.monotonic()) - self._began

    def pause(self) -> None:
        """Pause the sweep: no working time counts until `resume`."""
        self._paused_since = self._paused_since or time.monotonic()

    def unpause(self) -> None:
        """Continue a paused sweep."""
        if self._paused_since is not None:
            self._began += time.monotonic() - self._paused_since
            self._paused_since = None

    @property
    def seconds_since_write(self) -> float:
        """Seconds since the last accepted write of this driver, including the machine's sleep."""
        return clock() - self._last_write

    def heartbeat(self, connection: Connection) -> None:
        """Write a heartbeat. Raises SweepHeld as `check_fencing_token` does."""
        self.check_fencing_token(connection)
        self._repository.add_heartbeat(connection, self._token)

    def check_fencing_token(self, connection: Connection) -> None:
        """Check the fencing token: raise SweepHeld if a newer driver holds the lease, else record working time."""
        row = self._repository.sweep_row(connection, lock=True)
        if self.fenced or row is None or row.driver != self._token:
            self.fenced = True
            raise SweepHeld(self._repository.sweep, self._holder(connection, 0 if row is None else row.driver))
        self._repository.set_driver_seconds(connection, self._token, self.working_seconds)
        self._last_write = clock()

    def _holder(self, connection: Connection, token: int) -> str:
        return holder_name(self._repository.holder(connection, token)) if token else "no driver any more"

    def total_working_seconds(self, connection: Connection) -> float:
        """Return the working time in seconds of all drivers of this sweep, this one's up to now."""
        return self._repository.total_driver_seconds(connection, excluding=self._token) + self.working_seconds


class Heartbeat:
    """Calls `write` every HEARTBEAT_SECONDS in a thread of its own until `end`, or until it raises SweepHeld.

    Holds `write` weakly and ends when its study is garbage-collected; else this thread could hold SQLite's lock while
    the process calls fork(), and the child would wait forever.
    """

    def __init__(self, write: Callable[[], None]) -> None:
        """write: a bound method; only a weak reference is kept."""
        self._write, self._over = weakref.WeakMethod(write), threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Stop; no heartbeat is written after this returns."""
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(HEARTBEAT_SECONDS) and self._write_once():
            continue

    def _write_once(self) -> bool:
        """Write a heartbeat; return whether to continue."""
        write = self._write()
        if write is None:
            return False
        try:
            write()
        except SweepHeld:
            return False  # the driver's next write raises SweepHeld too, and that is reported
        except StorageRefused:
            return True  # likewise; the next heartbeat suffices if the database is back in time
        return True
