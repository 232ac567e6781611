"""What a result depends on besides its configuration: versions, hardware, the commit."""

from __future__ import annotations

import os
import platform
import shutil
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from orchestrator.engine.nvidia import NvidiaSmiHangs, output_of, query_gpus

_SECONDS = 10.0


def environment(folder: Path | None = None) -> dict[str, Any]:
    """This machine and installation as JSON; `folder` is where the commit is looked up (by default the program's)."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": _memory_gib(),
        "gpus": _gpus(),
        "git": git_commit(folder or Path(__file__).parent),
        "packages": _packages(),
    }


def environment_tags(found: dict[str, Any]) -> dict[str, str]:
    """The few facts of `environment` that people filter runs by."""
    packages = found["packages"]
    git = found["git"]
    tags = {f"env.{name}": packages[name] for name in ("torch", "transformers", "prefsweep") if name in packages}
    tags |= {"env.python": found["python"], "env.gpus": ", ".join(found["gpus"]) or "none"}
    if git is not None:
        tags |= {"mlflow.source.git.commit": git["commit"], "git.dirty": str(git["dirty"]).lower()}
    return tags


def git_commit(folder: Path) -> dict[str, Any] | None:
    """The commit of the repository that `folder` lies in, and whether files differ from it; None outside of one."""
    commit = _ask("git", "-C", str(folder), "rev-parse", "HEAD")
    if commit is None:
        return None
    return {"commit": commit.strip(), "dirty": bool(_ask("git", "-C", str(folder), "status", "--porcelain"))}


def _packages() -> dict[str, str]:
    found = {d.metadata["Name"]: d.version for d in distributions() if d.metadata["Name"]}
    return dict(sorted(found.items(), key=lambda item: item[0].lower()))


def _gpus() -> list[str]:
    try:
        return query_gpus("name,memory.total,driver_version")
    except NvidiaSmiHangs as why:
        return [str(why)]


def _memory_gib() -> float | None:
    if "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)


def _ask(*command: str) -> str | None:
    """What the command prints; None where it is missing, fails or hangs."""
    if shutil.which(command[0]) is None:
        return None
    return output_of(command, _SECONDS) or None
