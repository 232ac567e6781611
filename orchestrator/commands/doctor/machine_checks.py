"""`Check`, the result of one check of `doctor`, and the checks of packages, cores, memory, disks and Ray.

Ray's checks: its version, the folder of its sockets, and session folders of killed drivers.
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

from orchestrator.errors import DataError, SpecError
from orchestrator.execution.slots import plan_slots, usable_cpus
from orchestrator.folders import NETWORK_FILESYSTEMS, filesystem_type
from orchestrator.spec.estimates.input_checks import check_judge_prompts, check_pair_counts, read_small_files
from orchestrator.spec.estimates.input_sizes import check_model, models_read
from orchestrator.spec.estimates.sweep_plan import sweep_disk_need
from orchestrator.spec.sweep_spec import SweepSpec
from trainer.results import ModelError, TrialError


class CheckLevel(StrEnum):
    """ok: no problem; warn: sweeps run with restrictions; fail: sweeps, or this sweep, cannot run."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Check:
    """Result of one check: its subject, level, finding and fix."""

    what: str
    level: CheckLevel
    found: str
    fix: str = ""

    def as_json(self) -> dict[str, Any]:
        """Return the check as printed by `doctor --json`."""
        return asdict(self)


def is_healthy(checks: Sequence[Check]) -> bool:
    """Return whether no check failed, so that sweeps can run."""
    return all(check.level is not CheckLevel.FAIL for check in checks)


_GB = 1 << 30
_REQUIRED_PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "ray", "optuna", "mlflow")
_MIN_SHM_GB = 1.0
"""GB. Minimum of /dev/shm for Ray's object store and NCCL; the default of containers is 64 MB."""


def packages() -> Iterator[Check]:
    """Yield the checks of Python and the required packages."""
    yield Check("python", CheckLevel.OK, platform.python_version())
    for name in _REQUIRED_PACKAGES:
        found = package_version(name)
        if found is None:
            yield Check(name, CheckLevel.FAIL, "not installed", "make install")
        else:
            yield Check(name, CheckLevel.OK, found)


def package_version(name: str) -> str | None:
    """Return the version of an installed package; None where it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine_checks(root: Path, spec: SweepSpec | None) -> Iterator[Check]:
    """Yield the checks of cores, memory, shared memory, disk space, filesystem, files of models and data."""
    yield Check("cores", CheckLevel.OK, f"{usable_cpus()} usable of {os.cpu_count()}")
    yield _memory()
    yield shared_memory()
    yield _disk(root, spec)
    yield _filesystem(root, spec)
    if spec is not None:
        yield from _models(spec)
        yield _data(spec)


def _memory() -> Check:
    total = psutil.virtual_memory().total
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        total = min(total, int(text))
    if total < 4 * _GB:
        return Check("memory", CheckLevel.WARN, f"{total / _GB:.1f} GB", "use small models and budget.concurrency: 1")
    return Check("memory", CheckLevel.OK, f"{total / _GB:.1f} GB")


def shared_memory(path: Path = Path("/dev/shm")) -> Check:
    """Check the shared memory that Ray's object store and NCCL use."""
    fix = "in a container: `docker run --shm-size=16g`, or on Kubernetes an emptyDir with medium Memory at /dev/shm"
    if not path.is_dir():
        return Check("/dev/shm", CheckLevel.WARN, "missing: Ray uses the disk instead, which is slow", fix)
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
        return Check("disk", CheckLevel.FAIL, f"{root} cannot be written", "set ORCHESTRATE_HOME to a writable folder")
    free = shutil.disk_usage(path).free
    found = f"{free / _GB:.1f} GB free at {root}"
    try:
        need = None if spec is None else sweep_disk_need(spec, _slots(spec))
    except ModelError:  # reported by the check of the model
        need = None
    if need is not None and need.bytes > free:
        fix = "free some space, set ORCHESTRATE_HOME to a larger disk, or train adapters (base.lora)"
        return Check("disk", CheckLevel.FAIL, f"{found}; the sweep needs {need}", fix)
    if free < 2 * _GB:
        return Check("disk", CheckLevel.FAIL, found, "free some space, or set ORCHESTRATE_HOME to another disk")
    if need is None and free < 50 * _GB:
        fix = "enough for small models; a checkpoint of an 8B model with optimizer state takes about 100 GB"
        return Check("disk", CheckLevel.WARN, found, fix)
    return Check("disk", CheckLevel.OK, found if need is None else f"{found}; the sweep needs {need}")


def _slots(spec: SweepSpec) -> int | None:
    try:
        return plan_slots(spec).count
    except SpecError:  # no trial fits this machine; reported by the check of GPUs, and by `plan`
        return None


def _filesystem(root: Path, spec: SweepSpec | None) -> Check:
    kind = filesystem_type(nearest_existing(root))
    found = f"{kind or 'unknown'} under {root}"
    if kind not in NETWORK_FILESYSTEMS and not kind.startswith("fuse."):
        return Check("filesystem", CheckLevel.OK, found)
    if spec is not None and spec.storage is not None and not spec.storage.startswith("sqlite"):
        return Check("filesystem", CheckLevel.OK, f"{found}; the study is in a separate database")
    fix = "set ORCHESTRATE_HOME to a local disk, or `storage:` to PostgreSQL: SQLite loses data on network filesystems"
    return Check("filesystem", CheckLevel.FAIL, found, fix)


def _models(spec: SweepSpec) -> Iterator[Check]:
    """Check the files of models in folders of this machine; models of the hub are among the network checks."""
    for name, revision in models_read(spec):
        if not Path(name).is_dir():
            continue
        try:
            check_model(spec, name, revision)
        except ModelError as error:
            found, _, fix = str(error).rpartition("; ")
            yield Check(f"model {Path(name).name}", CheckLevel.FAIL, found or fix, fix)
        else:
            yield Check(f"model {Path(name).name}", CheckLevel.OK, "its files are complete")


def _data(spec: SweepSpec) -> Check:
    """Check the rows, the number of training pairs and the judge's prompts, as a sweep does before its trials."""
    try:
        check_pair_counts(spec)
        check_judge_prompts(spec)
    except (DataError, TrialError) as error:
        found, _, fix = str(error).rpartition("; ")
        return Check("data", CheckLevel.FAIL, found or fix, fix if found else "correct the file that it names")
    try:
        read = read_small_files(spec.base.data)
    except DataError as error:  # each kind of bad row in a line, then what they are together
        return Check("data", CheckLevel.FAIL, str(error).splitlines()[-1], "`orchestrate data FILE` shows the rows")
    if read is None:
        return Check("data", CheckLevel.OK, "enough pairs for an update, as far as rows can be counted here")
    return Check("data", CheckLevel.OK, f"{read.train} training pairs and {read.eval} held-out ones")


def nearest_existing(path: Path) -> Path:
    """Return the path, or its nearest existing parent."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return path.resolve()


MIN_RAY_VERSION = (2, 54)
"""Earlier versions let unauthenticated users delete jobs over the dashboard (CVE-2026-27482)."""
_SESSIONS = Path("/tmp")


def ray_checks(path: Path = _SESSIONS, found: str | None = None) -> Iterator[Check]:
    """Yield the checks of Ray's version and session folder `path`."""
    found = found or package_version("ray")
    if found is None:
        return  # reported by `packages`
    if tuple(int(part) for part in found.split(".")[:2]) < MIN_RAY_VERSION:
        fix = "make install: constraints.txt pins a safe version"
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
        fix = "resume their sweeps, which removes them; or remove " + " ".join(map(str, left[:3]))
        yield Check("ray sessions", CheckLevel.WARN, f"{len(left)} left in {path} by drivers that were killed", fix)
        return
    yield Check("ray sessions", CheckLevel.OK, f"{path}, {free / _GB:.1f} GB free")


def _has_live_process(folder: Path) -> bool:
    """Return whether a process of this session is alive, as far as this user can see its command line."""
    return any(str(folder) in " ".join(p.info["cmdline"] or ()) for p in psutil.process_iter(["cmdline"]))
