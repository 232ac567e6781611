"""What this machine offers and what is missing, each with its fix. Looks only; changes nothing, prints no secret."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import socket
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from orchestrator.engine.cluster import visible_gpus

_GB = 1 << 30
_NETWORK = ("nfs", "nfs4", "cifs", "smb3", "smbfs", "lustre", "gpfs", "beegfs", "ceph", "glusterfs", "9p", "afs")
_PATIENCE = 3.0
_NEEDED = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "ray", "optuna", "mlflow")


class Level(StrEnum):
    """ok; note: worth knowing; missing: sweeps will not run."""

    OK = "ok"
    NOTE = "note"
    MISSING = "missing"


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at."""

    what: str
    level: Level
    found: str
    fix: str = ""

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)


def healthy(checks: list[Check]) -> bool:
    """Whether sweeps can run here."""
    return all(check.level is not Level.MISSING for check in checks)


def examine(root: Path) -> list[Check]:
    """Every check, for the runs folder `root`."""
    return [
        Check("python", Level.OK, platform.python_version()),
        *_packages(),
        _gpu(),
        *_optional(),
        _cores(),
        _memory(),
        _disk(root),
        _filesystem(root),
        _hub_token(),
        _tracking(root),
    ]


def _packages() -> Iterator[Check]:
    for name in _NEEDED:
        found = _version(name)
        if found is None:
            yield Check(name, Level.MISSING, "not installed", "make install")
        else:
            yield Check(name, Level.OK, found)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpu() -> Check:
    cards = visible_gpus()
    try:
        import torch
    except ImportError:
        return Check("gpu", Level.NOTE, f"{cards} seen by the driver", "torch is not installed: make install")
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return Check("gpu", Level.OK, f"{len(names)}: {', '.join(dict.fromkeys(names))}; CUDA {torch.version.cuda}")
    if cards:
        fix = "install a CUDA build of torch that suits the driver (nvidia-smi names its CUDA version)"
        return Check("gpu", Level.MISSING, f"{cards} seen by the driver, none by torch {torch.__version__}", fix)
    fix = "none needed for the quickstart; for models of billions of parameters rent one"
    return Check("gpu", Level.NOTE, "none; trials run on the CPU", fix)


def _optional() -> Iterator[Check]:
    for module, name, use in (
        ("flash_attn", "flash-attn", "faster attention on GPUs"),
        ("bitsandbytes", "bitsandbytes", "model.load_in_4bit"),
    ):
        if importlib.util.find_spec(module) is not None:
            yield Check(name, Level.OK, _version(name) or "installed")
        elif visible_gpus():
            yield Check(name, Level.NOTE, f"not installed; optional: {use}", f"pip install {name}")
        else:
            yield Check(name, Level.OK, "not installed; of no use without a GPU")


def _cores() -> Check:
    return Check("cores", Level.OK, f"{len(os.sched_getaffinity(0))} usable of {os.cpu_count()}")


def _memory() -> Check:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        total = min(total, int(text))
    if total < 4 * _GB:
        return Check("memory", Level.NOTE, f"{total / _GB:.1f} GB", "budget.concurrency: 1, and small models")
    return Check("memory", Level.OK, f"{total / _GB:.1f} GB")


def _disk(root: Path) -> Check:
    place = _there(root)
    if not os.access(place, os.W_OK):
        return Check("disk", Level.MISSING, f"{root} cannot be written", "set ORCHESTRATE_HOME to a folder of yours")
    free = shutil.disk_usage(place).free
    if free < 2 * _GB:
        fix = "free some space, or set ORCHESTRATE_HOME to another disk"
        return Check("disk", Level.MISSING, f"{free / _GB:.1f} GB free at {root}", fix)
    if free < 50 * _GB:
        fix = "enough for small models; a checkpoint of an 8B model with its optimiser takes about 100 GB"
        return Check("disk", Level.NOTE, f"{free / _GB:.1f} GB free at {root}", fix)
    return Check("disk", Level.OK, f"{free / _GB:.1f} GB free at {root}")


def _filesystem(root: Path) -> Check:
    kind = filesystem(_there(root))
    if kind in _NETWORK or kind.startswith("fuse."):
        fix = "set ORCHESTRATE_HOME to a local disk: SQLite loses data on network filesystems"
        return Check("filesystem", Level.MISSING, f"{kind} under {root}", fix)
    return Check("filesystem", Level.OK, f"{kind or 'unknown'} under {root}")


def filesystem(path: Path, mounts: Path = Path("/proc/mounts")) -> str:
    """The kind of filesystem under this path; empty where that cannot be told."""
    if not mounts.is_file():
        return ""
    best, kind = -1, ""
    for line in mounts.read_text(encoding="utf-8", errors="replace").splitlines():
        _, point, found, *_ = line.split(" ")
        point = point.replace("\\040", " ")
        # Later mounts on the same point cover earlier ones.
        if path.is_relative_to(point) and len(point) >= best:
            best, kind = len(point), found
    return kind


def _hub_token() -> Check:
    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    file = Path(os.environ.get("HF_TOKEN_PATH", home / "token"))
    if os.environ.get("HF_TOKEN") or file.is_file():
        return Check("hub token", Level.OK, "present")
    fix = "for gated models such as Llama: `hf auth login`, and accept the model's licence on its page"
    return Check("hub token", Level.NOTE, "none", fix)


def _tracking(root: Path) -> Check:
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if not uri:
        return Check("tracking", Level.OK, f"MLflow in {root / 'mlflow.db'}")
    parts = urlsplit(uri)
    if parts.scheme not in ("http", "https"):
        return Check("tracking", Level.OK, f"MLFLOW_TRACKING_URI is a {parts.scheme or 'file'} store")
    # Without user and password, which may be in it.
    where = f"{parts.hostname}:{parts.port or (443 if parts.scheme == 'https' else 80)}"
    try:
        with socket.create_connection((parts.hostname or "", int(where.rpartition(":")[2])), timeout=_PATIENCE):
            return Check("tracking", Level.OK, f"{where} answers")
    except OSError as error:
        fix = "start it, or unset MLFLOW_TRACKING_URI; metrics wait on disk meanwhile and no trial is lost"
        return Check("tracking", Level.NOTE, f"{where} does not answer: {error.strerror or error}", fix)


def _there(path: Path) -> Path:
    """The nearest folder that exists."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return path.resolve()
