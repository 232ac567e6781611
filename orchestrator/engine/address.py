"""Which existing Ray cluster is meant by `--address`, and whether this process may knock there."""

from __future__ import annotations

import ipaddress
import os
import re
from dataclasses import dataclass
from pathlib import Path

from orchestrator import engine
from orchestrator.errors import OrchestrateError

AUTO = "auto"
_PLACE = re.compile(r"(?P<host>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):(?P<port>\d{1,5})")


class ClusterError(OrchestrateError):
    """The cluster that was asked for cannot be used; nothing was started."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A cluster that exists: HOST:PORT or auto, and how many of its machines are waited for."""

    address: str
    machines: int = 1


def find(asked: str) -> str:
    """`host:port` of the cluster; `auto` is RAY_ADDRESS, else the one that `ray start` began on this machine."""
    found = asked
    if asked == AUTO:
        found = os.environ.get("RAY_ADDRESS", "") or _started_here()
        if not found:
            raise ClusterError(
                "--address auto: no Ray cluster runs on this machine; start one with `ray start --head`, join one "
                "with `ray start --address=HOST:PORT`, or leave --address out"
            )
    match = _PLACE.fullmatch(found)
    if match is None or not 0 < int(match["port"]) < 65536:
        raise ClusterError(
            f"--address {found}: HOST:PORT or auto is expected (ray:// is not possible: the driver has to run on a "
            "machine of the cluster)"
        )
    return found


def is_loopback(address: str) -> bool:
    """Whether only this machine can reach it."""
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def authorise() -> None:
    """Ray is told whether to show a token; ClusterError where it must and there is none.

    RAY_AUTH_MODE=disabled, set by the user, is the only way to use a cluster that lets everybody in.
    """
    mode = (engine.ASKED_AUTH or "token").lower()
    os.environ["RAY_AUTH_MODE"] = mode
    if mode == "token" and not _has_token():
        raise ClusterError(
            "a cluster is joined with its token: set RAY_AUTH_TOKEN_PATH to the file that holds it, or put it into "
            "~/.ray/auth_token; only for a cluster without authentication set RAY_AUTH_MODE=disabled"
        )


def _has_token() -> bool:
    if os.environ.get("RAY_AUTH_TOKEN"):
        return True
    file = os.environ.get("RAY_AUTH_TOKEN_PATH")
    place = Path(file) if file else Path.home() / ".ray" / "auth_token"
    return place.is_file() and bool(place.read_text(encoding="utf-8").strip())


def _started_here() -> str:
    place = Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray" / "ray_current_cluster"
    return place.read_text(encoding="utf-8").strip() if place.is_file() else ""
