"""Ray: its version, the folder of its sockets, what killed drivers left behind."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from orchestrator.commands.doctor.check import Check, Level
from orchestrator.commands.doctor.machine import version

OLDEST = (2, 54)
"""Older ones let anybody delete jobs over the dashboard (CVE-2026-27482)."""
_SESSIONS = Path("/tmp")
_GB = 1 << 30


def checks(place: Path = _SESSIONS, found: str | None = None) -> Iterator[Check]:
    """Whether Ray can be started here."""
    found = found or version("ray")
    if found is None:
        return  # said among the packages
    if tuple(int(part) for part in found.split(".")[:2]) < OLDEST:
        fix = "make install: constraints.txt pins one that is safe"
        yield Check("ray version", Level.FAIL, f"{found} is older than {OLDEST[0]}.{OLDEST[1]}", fix)
    if not os.access(place, os.W_OK):
        fix = f"make {place} writable: Ray's sockets need a short path"
        yield Check("ray sessions", Level.FAIL, f"{place} cannot be written", fix)
        return
    free = shutil.disk_usage(place).free
    if free < _GB:
        fix = f"free some space in {place}: Ray keeps its sockets and logs there while a sweep runs"
        yield Check("ray sessions", Level.FAIL, f"{free / _GB:.1f} GB free in {place}", fix)
        return
    left = sorted(folder for folder in place.glob("prefsweep-*") if folder.is_dir() and not _alive(folder))
    if left:
        fix = "resume the sweeps they belong to, which clears them away; or remove " + " ".join(map(str, left[:3]))
        yield Check("ray sessions", Level.WARN, f"{len(left)} left in {place} by drivers that were killed", fix)
        return
    yield Check("ray sessions", Level.OK, f"{place}, {free / _GB:.1f} GB free")


def _alive(folder: Path) -> bool:
    """Whether a process still has files of this session open, as far as this user may see."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if str(folder) in (process / "cmdline").read_bytes().decode(errors="replace"):
                return True
        except OSError:  # it ended, or belongs to somebody else
            continue
    return False
