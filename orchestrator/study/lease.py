"""Whether a study's driver lives: by its process where that can be seen, else by whether it goes on counting.

No wall clock is compared: a driver counts its heartbeats and writes how long it has worked by its own monotonic clock,
and who wants its place watches, by a monotonic clock too, whether these numbers still grow.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

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
