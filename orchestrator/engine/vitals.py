"""Whether Ray itself still lives: its own processes can be killed like any other."""

from __future__ import annotations

from typing import Any

from orchestrator.errors import ExitCode, OrchestrateError

_VITAL = ("gcs_server", "raylet")


class RayDied(OrchestrateError):
    """A process of Ray's own ended; no worker can be reached any more. The study has everything: begin again."""

    code = ExitCode.OURS

    def __init__(self, names: list[str]) -> None:
        super().__init__(f"Ray's own process{'es' if len(names) > 1 else ''} {' and '.join(names)} ended")


def check_ray() -> None:
    """RayDied where nothing more can be expected of this cluster."""
    from ray._private import worker

    node: Any = worker._global_node  # pyright: ignore[reportPrivateUsage]
    ended = [] if node is None else [str(kind) for kind, _ in node.dead_processes() if kind in _VITAL]
    if ended:
        raise RayDied(sorted(set(ended)))
