"""One driver per sweep: a lock that ends with its process, and says whose it is."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from orchestrator.errors import SweepHeld
from orchestrator.folders import SweepFolder

_GLANCE_SECONDS = 0.5
"""`status` holds the lock for a moment to see whether anybody drives."""


@contextmanager
def hold(folder: SweepFolder) -> Generator[None]:
    """Be the sweep's driver while entered; SweepHeld, naming the holder, when another process is."""
    with folder.lock.open("a+", encoding="utf-8") as file:
        deadline = time.monotonic() + _GLANCE_SECONDS
        while not _locked(file):
            if time.monotonic() > deadline:
                raise SweepHeld(folder.name, _told(folder.lock))
            time.sleep(0.02)
        file.truncate(0)
        file.write(f"pid {os.getpid()} on {socket.gethostname()}, since {time.strftime('%F %T')}, boot {_boot()}")
        file.flush()
        yield
        file.truncate(0)


def holder(folder: SweepFolder) -> str | None:
    """Who drives the sweep; None when nobody does."""
    if not folder.lock.exists():
        return None
    with folder.lock.open(encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return _told(folder.lock)
    return None


def _locked(file: TextIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _told(path: Path) -> str:
    text = path.read_text(encoding="utf-8").strip()
    return text.partition(", boot")[0] or "a process that is just starting"


def _boot() -> str:
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text(encoding="ascii").strip() if path.exists() else "unknown"
