"""The driver's hold on a study: a token that fences off older drivers, and working time by the monotonic clock.

Whether a study's driver lives: by its process where that can be seen, else by whether it goes on counting.

No wall clock is compared: a driver counts its heartbeats and writes how long it has worked by its own monotonic clock,
and who wants its place watches, by a monotonic clock too, whether these numbers still grow.

A driver's signs of life, whatever the driver itself waits for: a pause, a long evaluation, a slow mirror.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from sqlalchemy import Connection

from orchestrator.errors import StorageRefused, SweepHeld
from orchestrator.study.database.repository import Ledger
from orchestrator.study.trial_records import DRIVER

BEAT = 10.0
"""Seconds between a driver's heartbeats."""
PATIENCE = 60.0
"""Seconds without a sign of life after which a driver that cannot be seen has lost the study."""
_GLANCE = 0.5
_MARK = ", process "


def signature() -> str:
    """This process: for people, then boot, pid namespace and start, which no other process ever has together."""
    return f"pid {os.getpid()} on {socket.gethostname()}{_MARK}{_place()}/{_started(os.getpid())}"


def shown(holder: str) -> str:
    """The part for people."""
    return holder.partition(_MARK)[0]


def is_gone(holder: str) -> bool:
    """Whether that process has certainly ended, or is this one. Of another machine's nothing is certain."""
    who, _, mark = holder.partition(_MARK)
    place, _, started = mark.rpartition("/")
    if place != _place() or "unknown" in (place, started):
        return False
    pid = int(who.split()[1])
    return pid == os.getpid() or _started(pid) != started


def lives_here(holder: str) -> bool:
    """Whether that process certainly lives, on this machine: also one that sleeps or was stopped by a signal."""
    place, _, started = holder.partition(_MARK)[2].rpartition("/")
    return place == _place() and "unknown" not in (place, started) and not is_gone(holder)


def is_stopped(holder: str) -> bool:
    """Whether a process that lives here was stopped, as by SIGSTOP or Ctrl-Z: it does nothing until SIGCONT."""
    fields = _stat(int(holder.split()[1]))
    return bool(fields) and fields[0] in ("T", "t")


def clock() -> float:
    """Seconds that only grow, also while the machine sleeps, where the system has such a clock."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


def put_down(holder: str) -> bool:
    """SIGKILL to that process, one whose work no longer counts; False where it cannot be told from here which it is."""
    who, _, mark = holder.partition(_MARK)
    place, _, started = mark.rpartition("/")
    if is_gone(holder) or place != _place() or started in ("none", "unknown"):
        return False
    os.kill(int(who.split()[1]), signal.SIGKILL)
    return True


def is_elsewhere(holder: str) -> bool:
    """Whether that process, if it lives, lives on another machine or in another container."""
    return holder.partition(_MARK)[2].rpartition("/")[0] != _place()


def goes_silent(signs: Callable[[], tuple[float, int] | None], patience: float) -> bool:
    """Watch a driver's signs of life: True when they stood still for so long, or the driver has left; False when they
    grew."""
    before, until = signs(), time.monotonic() + patience
    while before is not None and time.monotonic() < until:
        time.sleep(_GLANCE)
        now = signs()
        if now is None:
            break
        if now != before:
            return False
    return True


def _place() -> str:
    boot, namespace = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    if not boot.exists() or not namespace.is_symlink():
        return "unknown"
    return f"{boot.read_text(encoding='ascii').strip()}/{namespace.readlink()}"


def _started(pid: int) -> str:
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
OF_THE_MOMENT = (STOP, PAUSE, UNPAUSE)
"""For the whole sweep these are meant for the driver of that moment, not for the one that resumes later."""


class Driver:
    """One process that drives a sweep. A newer one fences it off: its writes are refused from then on."""

    def __init__(self, ledger: Ledger, token: int) -> None:
        self._ledger, self._token = ledger, token
        self._began, self._spoke = time.monotonic(), clock()
        self._rests_since: float | None = None
        self.fenced = False
        """Whether a write was refused because a newer driver took over."""

    @classmethod
    def begin(cls, ledger: Ledger, c: Connection) -> Driver:
        """Take over. Requests to stop that nobody answered have lapsed."""
        ledger.identity(c, lock=True)
        who = signature()
        driver = cls(ledger, ledger.new_driver(c, who))
        ledger.add_event(c, DRIVER, f"{shown(who)} drives", None)
        for request in ledger.requests(c):
            if request.trial is None and request.kind in OF_THE_MOMENT:
                ledger.done(c, request.seq)
                ledger.add_event(c, "lapsed", f"a request to {request.kind} lapsed: {request.text}", None)
        return driver

    @staticmethod
    def await_turn(ledger: Ledger, reading: Callable[[], AbstractContextManager[Connection]]) -> None:
        """Return once no driver lives; SweepHeld, naming it, when one does.

        One of this machine holds the sweep while its process lives. One elsewhere is watched: it has lost the sweep
        when it shows no sign of life for `lease.PATIENCE` seconds.
        """
        with reading() as c:
            identity = ledger.identity(c)
            holder = ledger.holder(c, identity.driver) if identity is not None and identity.driver else ""
        if identity is None or not holder or is_gone(holder):
            return
        if lives_here(holder):
            raise SweepHeld(ledger.sweep, shown(holder), stopped=is_stopped(holder))

        def signs() -> tuple[float, int] | None:
            with reading() as c:
                now = ledger.identity(c)
                return ledger.signs_of_life(c, identity.driver) if now is not None and now.driver else None

        if not goes_silent(signs, PATIENCE):
            raise SweepHeld(ledger.sweep, shown(holder))

    def leave(self, c: Connection) -> None:
        """The next driver need not wait. A driver that was fenced off has nothing to give back."""
        self._ledger.nobody_drives(c, self._token)

    @property
    def seconds(self) -> float:
        """How long this driver has been at it, rests left out."""
        return (self._rests_since or time.monotonic()) - self._began

    def rest(self) -> None:
        """The sweep is paused: from here on no working time counts."""
        self._rests_since = self._rests_since or time.monotonic()

    def wake(self) -> None:
        """It goes on."""
        if self._rests_since is not None:
            self._began += time.monotonic() - self._rests_since
            self._rests_since = None

    @property
    def silent(self) -> float:
        """Seconds since a write of this driver was last accepted, the machine's sleep included."""
        return clock() - self._spoke

    def beat(self, c: Connection) -> None:
        """A sign of life. Raises SweepHeld as `still_mine` does."""
        self.still_mine(c)
        self._ledger.beat(c, self._token)

    def still_mine(self, c: Connection) -> None:
        """Refuse the write if a newer driver took over; else note the time worked."""
        identity = self._ledger.identity(c, lock=True)
        if self.fenced or identity is None or identity.driver != self._token:
            self.fenced = True
            raise SweepHeld(self._ledger.sweep, self._holder(c, 0 if identity is None else identity.driver))
        self._ledger.worked(c, self._token, self.seconds)
        self._spoke = clock()

    def _holder(self, c: Connection, token: int) -> str:
        return shown(self._ledger.holder(c, token)) if token else "nobody any more"

    def seconds_of_all(self, c: Connection) -> float:
        """The working time of all drivers of this sweep, this one up to now."""
        return self._ledger.seconds(c, but=self._token) + self.seconds


class Heartbeat:
    """Calls `beat` every `lease.BEAT` seconds from a thread of its own until `end`, or until it raises SweepHeld."""

    def __init__(self, beat: Callable[[], None]) -> None:
        self._beat, self._over = beat, threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """No more beats once this returns."""
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(BEAT):
            try:
                self._beat()
            except SweepHeld:
                return  # the driver's next write is refused and tells it
            except StorageRefused:
                continue  # likewise; a database that comes back in time has missed nothing
