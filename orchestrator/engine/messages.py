"""What the driver hands to a worker and what it hears back. Plain values: no Ray, no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from orchestrator.study.state import FailureKind
from trainer.report import Point

STOP_FILE = "stop-asked"
"""In an attempt's folder: the worker checkpoints and hands the trial back."""

WORKER_FILE = "worker"
"""In an attempt's folder: which process has it, as `lease.signature()` tells it."""

MIRROR = "mirror"
"""The kind of event that tells of copies which failed."""


@dataclass(frozen=True, slots=True)
class Job:
    """One attempt at a trial. `config` is a TrialConfig as JSON: workers rebuild it, nothing else is shared."""

    run: str
    attempt: int
    config: str
    folder: Path
    earlier: tuple[Path, ...] = ()
    fork: Path | None = None
    """Another trial's checkpoint to go on from, where this one has none of its own yet."""
    mirror: str | None = None
    """URL of the trial's place in the sweep's mirror."""

    @property
    def id(self) -> str:
        """Stable, and different for each attempt."""
        return f"{self.run}-{self.attempt}"

    @property
    def lock(self) -> Path:
        """Held by the process that works on this trial: an older attempt's process may still be dying."""
        return self.folder.parent / "worker.lock"

    def ask_to_stop(self) -> None:
        """Have the worker checkpoint and let go."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / STOP_FILE).touch()

    @property
    def stop_asked(self) -> bool:
        """Whether the driver wants this trial back."""
        return (self.folder / STOP_FILE).exists()


class EndKind(StrEnum):
    """How an attempt ended. RELEASED, NO_DISK and LOST are no outcome of the trial: it will be issued again."""

    FINISHED = "finished"
    DIVERGED = "diverged"
    FAILED = "failed"
    RELEASED = "released"
    NO_DISK = "no disk"
    LOST = "lost"
    """With a process that cannot go on. Drivers hear of it as a worker that is lost."""


@dataclass(frozen=True, slots=True)
class End:
    """The end of an attempt. `signature` tells one bug from another."""

    kind: EndKind
    reason: str
    steps: int = 0
    failure: FailureKind | None = None
    signature: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    """Points in order, and the end when it came. `counters` says what the worker `pid` has loaded so far."""

    points: Sequence[Point]
    end: End | None
    pid: int
    counters: Mapping[str, int] = field(default_factory=dict[str, int])
    said: Sequence[str] = ()
    """What people should know of the mirror."""
    retire: bool = False
    """Whether the worker process is to get no other trial: it was using a GPU when this one failed."""
