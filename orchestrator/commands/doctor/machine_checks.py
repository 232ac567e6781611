"""`Check`, the result of one check of `doctor`; and the checks of packages, cores, memory, disks and Ray.

Ray's checks: its version, the folder of its sockets, and files that killed drivers left behind.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import psutil

from orchestrator.folders import NETWORK_FILESYSTEMS, filesystem_type
from orchestrator.spec.estimates.disk_space import disk_need, format_bytes
from orchestrator.spec.sweep_spec import SweepSpec


class CheckLevel(StrEnum):
    """ok; warn: worth knowing; fail: sweeps, or this sweep, will not run."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Check:
    """What was looked at, what was found, and how to put it right."""

    what: str
    level: CheckLevel
    found: str
    fix: str = ""

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)


def is_healthy(checks: Sequence[Check]) -> bool:
    """Whether sweeps can run here."""
    return all(check.level is not CheckLevel.FAIL for check in checks)


_GB = 1 << 30
_REQUIRED_PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "ray", "optuna", "mlflow")
_MIN_SHM_GB = 1.0
"""Below this, Ray's object store and NCCL run short; containers get 64 MB where nobody says otherwise."""


def packages() -> Iterator[Check]:
    """Python, and what is installed of what is needed."""
    yield Check("python", CheckLevel.OK, platform.python_version())
    for name in _REQUIRED_PACKAGES:
        found = package_version(name)
        if found is None:
            yield Check(name, CheckLevel.FAIL, "not installed", "make install")
        else:
            yield Check(name, CheckLevel.OK, found)


def package_version(name: str) -> str | None:
    """Of an installed package."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine_checks(root: Path, spec: SweepSpec | None) -> Iterator[Check]:
    """What every sweep takes of this machine."""
    yield Check("cores", CheckLevel.OK, f"{len(os.sched_getaffinity(0))} usable of {os.cpu_count()}")
    yield _memory()
    yield shared_memory()
    yield _disk(root, spec)
    yield _filesystem(root, spec)


def _memory() -> Check:
    total = psutil.virtual_memory().total
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        total = min(total, int(text))
    if total < 4 * _GB:
        return Check("memory", CheckLevel.WARN, f"{total / _GB:.1f} GB", "budget.concurrency: 1, and small models")
    return Check("memory", CheckLevel.OK, f"{total / _GB:.1f} GB")


def shared_memory(path: Path = Path("/dev/shm")) -> Check:
    """Ray's object store lies there, and NCCL's buffers."""
    fix = "in a container: `docker run --shm-size=16g`, or on Kubernetes an emptyDir with medium Memory at /dev/shm"
    if not path.is_dir():
        return Check("/dev/shm", CheckLevel.WARN, "not there: Ray uses the disk instead, which is slow", fix)
    usage = shutil.disk_usage(path)
    found = f"{usage.free / _GB:.1f} GB free of {usage.total / _GB:.1f} GB"
    if not os.access(path, os.W_OK):
        return Check("/dev/shm", CheckLevel.FAIL, f"{path} cannot be written", fix)
    if usage.free < _MIN_SHM_GB * _GB:
        return Check("/dev/shm", CheckLevel.WARN, found, fix)
    return Check("/dev/shm", CheckLevel.OK, found)


def _disk(root: Path, spec: SweepSpec | None) -> Check:
    path = nearest_existing(root)
    if not os.access(path, os.W_OK):
        return Check("disk", CheckLevel.FAIL, f"{root} cannot be written", "set ORCHESTRATE_HOME to a folder of yours")
    free = shutil.disk_usage(path).free
    found = f"{free / _GB:.1f} GB free at {root}"
    need = None if spec is None else disk_need(spec, spec.budget.concurrency or 1)
    if need is not None and need.bytes > free:
        fix = "free some space, set ORCHESTRATE_HOME to a larger disk, or train adapters (base.lora)"
        return Check("disk", CheckLevel.FAIL, f"{found}; the sweep takes {format_bytes(need.bytes)}", fix)
    if free < 2 * _GB:
        return Check("disk", CheckLevel.FAIL, found, "free some space, or set ORCHESTRATE_HOME to another disk")
    if need is None and free < 50 * _GB:
        fix = "enough for small models; a checkpoint of an 8B model with its optimiser takes about 100 GB"
        return Check("disk", CheckLevel.WARN, found, fix)
    return Check(
        "disk", CheckLevel.OK, found if need is None else f"{found}; the sweep takes {format_bytes(need.bytes)}"
    )


def _filesystem(root: Path, spec: SweepSpec | None) -> Check:
    kind = filesystem_type(nearest_existing(root))
    found = f"{kind or 'unknown'} under {root}"
    if kind not in NETWORK_FILESYSTEMS and not kind.startswith("fuse."):
        return Check("filesystem", CheckLevel.OK, found)
    if spec is not None and spec.storage is not None and not spec.storage.startswith("sqlite"):
        return Check("filesystem", CheckLevel.OK, f"{found}; the study is in a database of its own")
    fix = "set ORCHESTRATE_HOME to a local disk, or `storage:` to PostgreSQL: SQLite loses data on network filesystems"
    return Check("filesystem", CheckLevel.FAIL, found, fix)


def nearest_existing(path: Path) -> Path:
    """The nearest folder that exists."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return path.resolve()


MIN_RAY_VERSION = (2, 54)
"""Older ones let anybody delete jobs over the dashboard (CVE-2026-27482)."""
_SESSIONS = Path("/tmp")


def ray_checks(path: Path = _SESSIONS, found: str | None = None) -> Iterator[Check]:
    """Whether Ray can be started here."""
    found = found or package_version("ray")
    if found is None:
        return  # said among the packages
    if tuple(int(part) for part in found.split(".")[:2]) < MIN_RAY_VERSION:
        fix = "make install: constraints.txt pins one that is safe"
        yield Check(
            "ray version", CheckLevel.FAIL, f"{found} is older than {MIN_RAY_VERSION[0]}.{MIN_RAY_VERSION[1]}", fix
        )
    if not os.access(path, os.W_OK):
        fix = f"make {path} writable: Ray's sockets need a short path"
        yield Check("ray sessions", CheckLevel.FAIL, f"{path} cannot be written", fix)
        return
    free = shutil.disk_usage(path).free
    if free < _GB:
        fix = f"free some space in {path}: Ray keeps its sockets and logs there while a sweep runs"
        yield Check("ray sessions", CheckLevel.FAIL, f"{free / _GB:.1f} GB free in {path}", fix)
        return
    left = sorted(folder for folder in path.glob("prefsweep-*") if folder.is_dir() and not _has_live_process(folder))
    if left:
        fix = "resume the sweeps they belong to, which clears them away; or remove " + " ".join(map(str, left[:3]))
        yield Check("ray sessions", CheckLevel.WARN, f"{len(left)} left in {path} by drivers that were killed", fix)
        return
    yield Check("ray sessions", CheckLevel.OK, f"{path}, {free / _GB:.1f} GB free")


def _has_live_process(folder: Path) -> bool:
    """Whether a process still has files of this session open, as far as this user may see."""
    # None: it belongs to somebody else
    return any(str(folder) in " ".join(p.info["cmdline"] or ()) for p in psutil.process_iter(["cmdline"]))
