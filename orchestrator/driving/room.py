"""Whether the disk has room for a sweep, asked before anything is spent."""

from __future__ import annotations

import shutil
from pathlib import Path

from orchestrator.engine.cluster import Slots
from orchestrator.errors import StorageRefused
from orchestrator.folders import SweepFolder
from orchestrator.spec.disk import disk_need, size
from orchestrator.spec.sweep import SweepSpec


class NoRoom(StorageRefused):
    """The disk would be full before the sweep's end."""


def check_room(folder: SweepFolder, spec: SweepSpec, slots: Slots) -> None:
    """NoRoom, with what would help, where the sweep's fullest moment does not fit beside what is there already."""
    need = disk_need(spec, slots.count)
    if need is None:  # a model that is not downloaded and whose name tells no size
        return
    place = folder.root
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free + _held(folder.path / "trials")
    if need.bytes <= free:
        return
    ways = ["a larger disk for the runs folder ($ORCHESTRATE_HOME)"]
    fewer = disk_need(spec, 1)
    if slots.count > 1 and fewer is not None:
        ways.append(f"--set budget.concurrency=1 ({size(fewer.bytes)})")
    judged = 1 if spec.judge is None else spec.judge.top
    if spec.keep_models > judged:
        ways.append(f"--set keep_models={judged} ({size((spec.keep_models - judged) * need.model)} less)")
    if spec.kept > spec.keep_models:
        ways.append(f"--set judge.top=1 ({size((spec.kept - spec.keep_models) * need.model)} less)")
    if spec.base.lora is None:
        ways.append("adapters instead of full weights (base.lora)")
    raise NoRoom(f"{spec.name} needs {need}; {size(free)} are free in {place}. What helps: {', or '.join(ways)}")


def _held(place: Path) -> int:
    """Bytes of this sweep's trials that are on the disk already: they are part of what it needs."""
    return sum(file.stat().st_size for file in place.rglob("*") if file.is_file()) if place.is_dir() else 0
