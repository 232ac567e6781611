"""The seam to the outside: what a tracking sink is told. Every call may be repeated and must then change nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from trainer.report import Point


class Sink(Protocol):
    """Receives a sweep's story. `run` names a run inside the sweep: "sweep", "sft" or the trial's number as text."""

    def start(self, run: str, *, name: str, params: Mapping[str, Any], tags: Mapping[str, str], at: float) -> None:
        """A run begins (or begins again: then only new tags are set)."""
        ...

    def points(self, run: str, points: Sequence[Point], *, at: float) -> None:
        """Metrics at their steps; steps at or below the last one told for this run are skipped."""
        ...

    def tag(self, run: str, tags: Mapping[str, str]) -> None:
        """Set tags."""
        ...

    def artifact(self, run: str, path: Path, folder: str = "") -> None:
        """Attach a file."""
        ...

    def end(self, run: str, *, status: str, tags: Mapping[str, str], at: float) -> None:
        """A run is over: FINISHED, FAILED or KILLED."""
        ...

    def close(self, timeout: float) -> int:
        """Deliver what is left for up to `timeout` seconds; returns how many messages stay for later."""
        ...
