"""`DriverLease`: the driver's right to write to a study, with fencing token, heartbeat and working time.

Whether a driver is alive is read from its process where that can be seen, else from its heartbeat. No wall clock is
compared: a driver counts heartbeats and writes its working time by its own monotonic clock, and a process that wants
the lease watches, by a monotonic clock too, whether these numbers still grow. The heartbeat continues while the driver
waits for a pause, a long evaluation or a slow mirror.
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
"""Seconds without a sign of life after which a driver that cannot be seen has lost the study."""
_POLL_SECONDS = 0.5
_MARK = ", process "


def process_id() -> str:
    """This process: for people, then boot, pid namespace and start, which no other process ever has together."""
    return f"pid {os.getpid()} on {socket.gethostname()}{_MARK}{_machine_id()}/{_start_time(os.getpid())}"


def holder_name(holder: str) -> str:
    """The part for people."""
    return holder.partition(_MARK)[0]


def has_ended(holder: str) -> bool:
    """Whether that process has certainly ended, or is this one. Of another machine's nothing is certain."""
    name, _, mark = holder.partition(_MARK)
    machine, _, started = mark.rpartition("/")
    if machine != _machine_id() or "unknown" in (machine, started):
        return False
    pid = int(name.split()[1])
    return pid == os.getpid() or _start_time(pid) != started


def lives_here(holder: str) -> bool:
    """Whether that process certainly lives, on this machine: also one that sleeps or was stopped by a signal."""
    machine, _, started = holder.partition(_MARK)[2].rpartition("/")
    return machine == _machine_id() and "unknown" not in (machine, started) and not has_ended(holder)


def is_stopped(holder: str) -> bool:
    """Whether a process that lives here was stopped, as by SIGSTOP or Ctrl-Z: it does nothing until SIGCONT."""
    fields = _stat(int(holder.split()[1]))
    return bool(fields) and fields[0] in ("T", "t")


def clock() -> float:
    """Seconds that only grow, also while the machine sleeps, where the system has such a clock."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


def kill(holder: str) -> bool:
    """SIGKILL to that process, one whose work no longer counts; False where it cannot be told from here which it is."""
    name, _, mark = holder.partition(_MARK)
    machine, _, started = mark.rpartition("/")
    if has_ended(holder) or machine != _machine_id() or started in ("none", "unknown"):
        return False
    os.kill(int(name.split()[1]), signal.SIGKILL)
    return True


def is_remote(holder: str) -> bool:
    """Whether that process, if it lives, lives on another machine or in another container."""
    return holder.partition(_MARK)[2].rpartition("/")[0] != _machine_id()


def watch_heartbeat(signs: Callable[[], tuple[float, int] | None], timeout: float) -> bool:
    """Watch a driver's heartbeat for `timeout` seconds.

    Returns True if it stood still or the driver has left, False as soon as it grew.
    """
    before, until = signs(), time.monotonic() + timeout
    while before is not None and time.monotonic() < until:
        time.sleep(_POLL_SECONDS)
        now = signs()
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
    """When the process began, in ticks since boot; `none` where there is no such process or only its shell."""
    fields = _stat(pid)
    if not fields:
        return "none" if Path("/proc/self/stat").exists() else "unknown"
    return "none" if fields[0] in ("Z", "X") else fields[19]


def _stat(pid: int) -> list[str]:
    """The process's state and what follows it in /proc; empty where there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


STOP, PAUSE, UNPAUSE, PRUNE = "stop", "pause", "unpause", "prune"
"""What any terminal may ask of the driver, for the whole sweep or for one trial."""
EXPIRING_REQUESTS = (STOP, PAUSE, UNPAUSE)
"""For the whole sweep these are meant for the driver of that moment, not for the one that resumes later."""


class DriverLease:
    """One process that drives a sweep. A newer one fences it off: its writes are refused from then on."""

    def __init__(self, repository: SweepRepository, token: int) -> None:
        self._repository, self._token = repository, token
        self._began, self._last_write = time.monotonic(), clock()
        self._paused_since: float | None = None
        self.fenced = False
        """Whether a write was refused because a newer driver took over."""

    @classmethod
    def acquire(cls, repository: SweepRepository, c: Connection) -> DriverLease:
        """Take over. Requests to stop that nobody answered have lapsed."""
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
        """Return once no driver lives; SweepHeld, naming it, when one does.

        One of this machine holds the sweep while its process lives. One elsewhere is watched: it has lost the sweep
        when it shows no sign of life for SILENCE_TIMEOUT seconds.
        """
        with reading() as c:
            identity = repository.identity(c)
            holder = repository.holder(c, identity.driver) if identity is not None and identity.driver else ""
        if identity is None or not holder or has_ended(holder):
            return
        if lives_here(holder):
            raise SweepHeld(repository.sweep, holder_name(holder), stopped=is_stopped(holder))

        def signs() -> tuple[float, int] | None:
            with reading() as c:
                now = repository.identity(c)
                return repository.signs_of_life(c, identity.driver) if now is not None and now.driver else None

        if not watch_heartbeat(signs, SILENCE_TIMEOUT):
            raise SweepHeld(repository.sweep, holder_name(holder))

    def release(self, c: Connection) -> None:
        """The next driver need not wait. A driver that was fenced off has nothing to give back."""
        self._repository.release_driver(c, self._token)

    @property
    def working_seconds(self) -> float:
        """How long this driver has been at it, rests left out."""
        return (self._paused_since or time.monotonic()) - self._began

    def pause(self) -> None:
        """The sweep is paused: from here on no working time counts."""
        self._paused_since = self._paused_since or time.monotonic()

    def resume(self) -> None:
        """It goes on."""
        if self._paused_since is not None:
            self._began += time.monotonic() - self._paused_since
            self._paused_since = None

    @property
    def seconds_since_write(self) -> float:
        """Seconds since a write of this driver was last accepted, the machine's sleep included."""
        return clock() - self._last_write

    def beat(self, c: Connection) -> None:
        """A sign of life. Raises SweepHeld as `check_fencing_token` does."""
        self.check_fencing_token(c)
        self._repository.beat(c, self._token)

    def check_fencing_token(self, c: Connection) -> None:
        """Refuse the write if a newer driver took over; else note the time worked."""
        identity = self._repository.identity(c, lock=True)
        if self.fenced or identity is None or identity.driver != self._token:
            self.fenced = True
            raise SweepHeld(self._repository.sweep, self._holder(c, 0 if identity is None else identity.driver))
        self._repository.set_driver_seconds(c, self._token, self.working_seconds)
        self._last_write = clock()

    def _holder(self, c: Connection, token: int) -> str:
        return holder_name(self._repository.holder(c, token)) if token else "nobody any more"

    def total_working_seconds(self, c: Connection) -> float:
        """The working time of all drivers of this sweep, this one up to now."""
        return self._repository.total_driver_seconds(c, excluding=self._token) + self.working_seconds


class Heartbeat:
    """Calls `beat` every HEARTBEAT_SECONDS from a thread of its own until `end`, or until it raises SweepHeld.

    The thread also ends once the object of the method `beat` is gone: of a study that nobody holds nobody drives a
    sweep. A thread that stayed would be in SQLite now and then, and a process forked at that moment waits for ever.
    """

    def __init__(self, beat: Callable[[], None]) -> None:
        """beat: a bound method, of which a weak reference is kept."""
        self._beat, self._over = weakref.WeakMethod(beat), threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """No more beats once this returns."""
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(HEARTBEAT_SECONDS) and (beat := self._beat()) is not None:
            try:
                beat()
            except SweepHeld:
                return  # the driver's next write is refused and tells it
            except StorageRefused:
                pass  # likewise; a database that comes back in time has missed nothing
            del beat
