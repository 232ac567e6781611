"""What the engine tells whoever looks on. Implemented in dashboards: live.py, lines.py.

The seam to the outside: what a tracking sink is told. Every call may be repeated and must then change nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from orchestrator.spec.sweep_spec import SweepSpec
from orchestrator.study.study import Study
from orchestrator.study.trial_records import TrialRecord
from trainer.results import Point

StepsOf = Callable[[Mapping[str, Any]], int]


class View(Protocol):
    """Every call returns at once; a view never decides anything."""

    def stage(self, text: str) -> None:
        """What the sweep is busy with before its trials."""
        ...

    def say(self, text: str) -> None:
        """A line that stays."""
        ...

    def expect(self, steps: StepsOf) -> None:
        """The number of updates of a trial by its params, once known."""
        ...

    def trial_changed(self, record: TrialRecord) -> None:
        """A trial began, ended or was issued again."""
        ...

    def points(self, number: int, points: Sequence[Point]) -> None:
        """New metrics of a trial."""
        ...

    def tick(self) -> None:
        """Time passed."""
        ...

    def close(self) -> None:
        """Leave the terminal as it was."""
        ...


@dataclass(frozen=True, slots=True)
class ReportFiles:
    """A sweep's report on disk. `description`: Markdown for the sweep's own page in MLflow."""

    page: Path
    figures: Path
    description: str


class SweepReporter(Protocol):
    """Describes and reports a sweep. Implemented by `dashboards.sweep_reporter`; it reads and decides nothing."""

    def charts_view(self, spec: SweepSpec) -> tuple[str, str]:
        """Key and value of the MLflow experiment tag that holds the saved view of charts."""
        ...

    def describe(self, study: Study, state: str, *, steps: StepsOf | None, diagnose: bool = True) -> str:
        """Return Markdown: where the sweep stands and, where `diagnose`, what is wrong and what to try next.

        state: "running", "finished" or "interrupted"; steps: updates of a trial by its params, None where unknown.
        """
        ...

    def write_report(self, study: Study, state: str, *, steps: StepsOf | None) -> ReportFiles:
        """Write report.html and its figures into the sweep's folder."""
        ...


@dataclass(frozen=True, slots=True)
class Presentation:
    """What a driver shows its sweep with; the command line puts it together."""

    open_view: Callable[[SweepSpec, int | None], View]
    """From a spec and the number of its trials, None where it is not known."""
    reporter: SweepReporter


SWEEP = "sweep"
SFT = "sft"
"""Names of runs inside a sweep; a trial's run is its number as text."""


class Unreachable(Exception):
    """The receiver cannot take messages now. The same message is worth trying again later."""


class Refused(Exception):
    """The receiver will never take this message. It is set aside and the next one follows."""


class Receiver(Protocol):
    """Receives a sweep's story. `run` names a run inside the sweep: "sweep", "sft" or the trial's number as text.

    Raises Unreachable or Refused; anything else is a fault of ours.
    """

    def start(self, run: str, *, name: str, params: Mapping[str, Any], tags: Mapping[str, str], at: float) -> None:
        """A run begins (or begins again: then only new params and tags are set)."""
        ...

    def points(self, run: str, points: Sequence[Point], *, at: float) -> None:
        """Metrics at their steps; steps at or below the last one told for this run are skipped."""
        ...

    def values(self, run: str, values: Mapping[str, float], *, step: int, at: float) -> None:
        """Numbers that have no course, such as a judge's: one that is the run's newest already changes nothing."""
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


@runtime_checkable
class TakesCourses(Protocol):
    """A receiver for which several messages of one run cost little more than one."""

    def course(self, run: str, told: Sequence[tuple[Sequence[Point], float]]) -> None:
        """The same as `points` with each of these and its time, one after the other."""
        ...


class Sink(Receiver, Protocol):
    """What the driver tells: calls return at once and raise only when the disk refuses (StorageRefused)."""

    def close(self, timeout: float) -> int:
        """Deliver what is left for up to `timeout` seconds; returns how many messages stay for later."""
        ...
