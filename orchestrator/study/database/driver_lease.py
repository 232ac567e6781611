"""`DriverLease`: the driver's right to write to a study, with fencing token, heartbeat and working time.

Whether a driver is alive is read from its process where this machine can see it, else from its heartbeat. Liveness
needs no wall clock: each driver increments a heartbeat counter and its working time; a waiting process checks whether
either increases. The heartbeat continues while the driver waits for a pause, a long evaluation or a slow mirror.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from sqlalchemy import Connection

from orchestrator.errors import StorageRefused, SweepHeld
from orchestrator.study.database.repository import SweepRepository
from orchestrator.study.trial_records import DRIVER_EVENT

HEARTBEAT_SECONDS = 10.0
"""Seconds between a driver's heartbeats."""
SILENCE_TIMEOUT = 60.0
"""Seconds without a heartbeat after which a driver on another machine has lost its lease."""
_POLL_SECONDS = 0.5
_MARK = ", process "


def process_id() -> str:
    """Return a unique name of this process: readable text, then boot id, pid namespace and start time."""
    return f"pid {os.getpid()} on {socket.gethostname()}{_MARK}{_machine_id()}/{_start_time(os.getpid())}"


def holder_name(holder: str) -> str:
    """Return the readable part of a process's name."""
    return holder.partition(_MARK)[0]


def has_ended(holder: str) -> bool:
    """Return whether the process has certainly ended; False for processes of other machines.

    True also for this process itself, whose earlier lease may be replaced.
    """
    name, _, mark = holder.partition(_MARK)
    machine, _, started = mark.rpartition("/")
    if machine != _machine_id() or "unknown" in (machine, started):
        return False
    pid = int(name.split()[1])
    return pid == os.getpid() or _start_time(pid) != started


def is_alive_here(holder: str) -> bool:
    """Return whether the process certainly runs on this machine; also True if it sleeps or is stopped by a signal."""
    machine, _, started = holder.partition(_MARK)[2].rpartition("/")
    return machine == _machine_id() and "unknown" not in (machine, started) and not has_ended(holder)


def is_stopped(holder: str) -> bool:
    """Return whether a process of this machine is stopped by SIGSTOP or Ctrl-Z and does nothing until SIGCONT."""
    fields = _stat(int(holder.split()[1]))
    return bool(fields) and fields[0] in ("T", "t")


def clock() -> float:
    """Return monotonic seconds, including the machine's sleep where the system has such a clock."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


def kill(holder: str) -> bool:
    """Send SIGKILL to a process of this machine; return False if it has ended or cannot be identified."""
    name, _, mark = holder.partition(_MARK)
    machine, _, started = mark.rpartition("/")
    if has_ended(holder) or machine != _machine_id() or started in ("none", "unknown"):
        return False
    os.kill(int(name.split()[1]), signal.SIGKILL)
    return True


def is_remote(holder: str) -> bool:
    """Return whether the process belongs to another machine or another container."""
    return holder.partition(_MARK)[2].rpartition("/")[0] != _machine_id()


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


def _machine_id() -> str:
    boot, namespace = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    if not boot.exists() or not namespace.is_symlink():
        return "unknown"
    return f"{boot.read_text(encoding='ascii').strip()}/{namespace.readlink()}"


def _start_time(pid: int) -> str:
    """Start time of the process in ticks since boot; "none" if it does not exist or is a zombie."""
    fields = _stat(pid)
    if not fields:
        return "none" if Path("/proc/self/stat").exists() else "unknown"
    return "none" if fields[0] in ("Z", "X") else fields[19]


def _stat(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat from the process's state on; empty if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


STOP, PAUSE, UNPAUSE, PRUNE = "stop", "pause", "unpause", "prune"
RETRY, SET, ABANDON = "retry", "set", "abandon"
"""Kinds of requests to the driver, for the whole sweep or for one trial."""
EXTENDING_REQUESTS = (RETRY, SET)
"""Requests that may give a driver more to do, so that it answers them before it ends."""
EXPIRING_REQUESTS = (STOP, PAUSE, UNPAUSE, ABANDON)
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
    def acquire(cls, repository: SweepRepository, c: Connection) -> DriverLease:
        """Acquire the lease with a new fencing token. Unanswered requests to stop or pause the whole sweep expire."""
        repository.identity(c, lock=True)
        name = process_id()
        driver = cls(repository, repository.add_driver(c, name))
        repository.add_event(c, DRIVER_EVENT, f"{holder_name(name)} drives", None)
        for request in repository.requests(c):
            if request.trial is None and request.kind in EXPIRING_REQUESTS:
                repository.complete_request(c, request.seq)
                repository.add_event(c, "lapsed", f"a request to {request.kind} lapsed: {request.text}", None)
        return driver

    @staticmethod
    def wait_for_release(
        repository: SweepRepository, reading: Callable[[], AbstractContextManager[Connection]]
    ) -> None:
        """Return once no driver is alive; raise SweepHeld, naming it, if one is.

        A driver of this machine holds the lease while its process runs; one of another machine loses it after
        SILENCE_TIMEOUT seconds without a heartbeat.
        """
        with reading() as c:
            identity = repository.identity(c)
            holder = repository.holder(c, identity.driver) if identity is not None and identity.driver else ""
        if identity is None or not holder or has_ended(holder):
            return
        if is_alive_here(holder):
            raise SweepHeld(repository.sweep, holder_name(holder), stopped=is_stopped(holder))

        def counters() -> tuple[float, int] | None:
            with reading() as c:
                now = repository.identity(c)
                return repository.heartbeat_counters(c, identity.driver) if now is not None and now.driver else None

        if not watch_heartbeat(counters, SILENCE_TIMEOUT):
            raise SweepHeld(repository.sweep, holder_name(holder))

    def release(self, c: Connection) -> None:
        """Release the lease, so that the next driver need not wait. Does nothing if a newer driver has it."""
        self._repository.release_driver(c, self._token)

    @property
    def working_seconds(self) -> float:
        """Seconds since the lease was acquired, without pauses of the whole sweep."""
        return (self._paused_since or time.monotonic()) - self._began

    def pause(self) -> None:
        """Pause the sweep: no working time counts until `resume`."""
        self._paused_since = self._paused_since or time.monotonic()

    def resume(self) -> None:
        """Continue a paused sweep."""
        if self._paused_since is not None:
            self._began += time.monotonic() - self._paused_since
            self._paused_since = None

    @property
    def seconds_since_write(self) -> float:
        """Seconds since the last accepted write of this driver, including the machine's sleep."""
        return clock() - self._last_write

    def heartbeat(self, c: Connection) -> None:
        """Write a heartbeat. Raises SweepHeld as `check_fencing_token` does."""
        self.check_fencing_token(c)
        self._repository.add_heartbeat(c, self._token)

    def check_fencing_token(self, c: Connection) -> None:
        """Check the fencing token: raise SweepHeld if a newer driver holds the lease, else record working time."""
        identity = self._repository.identity(c, lock=True)
        if self.fenced or identity is None or identity.driver != self._token:
            self.fenced = True
            raise SweepHeld(self._repository.sweep, self._holder(c, 0 if identity is None else identity.driver))
        self._repository.set_driver_seconds(c, self._token, self.working_seconds)
        self._last_write = clock()

    def _holder(self, c: Connection, token: int) -> str:
        return holder_name(self._repository.holder(c, token)) if token else "no driver any more"

    def total_working_seconds(self, c: Connection) -> float:
        """Return the working time in seconds of all drivers of this sweep, this one's up to now."""
        return self._repository.total_driver_seconds(c, excluding=self._token) + self.working_seconds


class Heartbeat:
    """Calls `write` every HEARTBEAT_SECONDS in a thread of its own until `end`, or until it raises SweepHeld.

    The thread also ends once the study of the method `write` is garbage-collected. Otherwise the heartbeat thread could
    hold SQLite's lock during a fork, and the child would wait forever.
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
