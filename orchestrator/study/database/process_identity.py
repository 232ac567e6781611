"""Names of processes that hold a lease or a lock, and whether such a process still runs.

The name has the machine's boot id, the pid namespace and the process's start time, so that a reused process id is not
taken for the old process.
"""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path

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
