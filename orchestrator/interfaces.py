"""Protocols through which the driver reports: `ProgressView`, `TrackingSink` and `SweepReporter`.

Views and reporter are implemented in dashboards, sinks in orchestrator.tracking. Every call of a sink may be repeated
and must then change nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from orchestrator.spec.sweep_spec import SweepSpec
from trainer.results import StepMetrics

if TYPE_CHECKING:
    from orchestrator.study.study import Study
    from orchestrator.study.trial_records import TrialRecord

UpdatesOf = Callable[[Mapping[str, Any]], int]


class ProgressView(Protocol):
    """Every call returns at once; a view never decides anything."""

    def set_stage(self, text: str) -> None:
        """What the sweep is busy with before its trials."""
        ...

    def log(self, text: str) -> None:
        """A line that stays."""
        ...

    def set_total_updates(self, updates_of: UpdatesOf) -> None:
        """The number of updates of a trial by its params, once known."""
        ...

    def update_trial(self, record: TrialRecord) -> None:
        """A trial began, ended or was issued again."""
        ...

    def add_metrics(self, number: int, metrics: Sequence[StepMetrics]) -> None:
        """New metrics of a trial."""
        ...

    def refresh(self) -> None:
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

    def describe(self, study: Study, state: str, *, steps: UpdatesOf | None, diagnose: bool = True) -> str:
        """Return Markdown: where the sweep stands and, where `diagnose`, what is wrong and what to try next.

        state: "running", "finished" or "interrupted"; steps: updates of a trial by its params, None where unknown.
        """
        ...

    def write_report(self, study: Study, state: str, *, steps: UpdatesOf | None) -> ReportFiles:
        """Write report.html and its figures into the sweep's folder."""
        ...


@dataclass(frozen=True, slots=True)
class Presentation:
    """What a driver shows its sweep with; the command line puts it together."""

    open_view: Callable[[SweepSpec, int | None], ProgressView]
    """From a spec and the number of its trials, None where it is not known."""
    reporter: SweepReporter


SWEEP = "sweep"
SFT = "sft"
"""Names of runs inside a sweep; a trial's run is its number as text."""


class TrackingUnavailable(Exception):
    """The receiver cannot take messages now. The same message is worth trying again later."""


class MessageRejected(Exception):
    """The receiver will never take this message. It is set aside and the next one follows."""


class TrackingReceiver(Protocol):
    """Receives a sweep's story. `run` names a run inside the sweep: "sweep", "sft" or the trial's number as text.

    Raises TrackingUnavailable or MessageRejected; anything else is a fault of ours.
    """

    def start_run(self, run: str, *, name: str, params: Mapping[str, Any], tags: Mapping[str, str], at: float) -> None:
        """A run begins (or begins again: then only new params and tags are set)."""
        ...

    def log_metrics(self, run: str, metrics: Sequence[StepMetrics], *, at: float) -> None:
        """Metrics at their steps; steps at or below the last one told for this run are skipped."""
        ...

    def log_final_metrics(self, run: str, values: Mapping[str, float], *, step: int, at: float) -> None:
        """Numbers that have no course, such as a judge's: one that is the run's newest already changes nothing."""
        ...

    def set_tags(self, run: str, tags: Mapping[str, str]) -> None:
        """Set tags."""
        ...

    def log_artifact(self, run: str, path: Path, folder: str = "") -> None:
        """Attach a file."""
        ...

    def end_run(self, run: str, *, status: str, tags: Mapping[str, str], at: float) -> None:
        """A run is over: FINISHED, FAILED or KILLED."""
        ...


@runtime_checkable
class BatchReceiver(Protocol):
    """A receiver for which several messages of one run cost little more than one."""

    def log_metric_history(self, run: str, history: Sequence[tuple[Sequence[StepMetrics], float]]) -> None:
        """The same as `points` with each of these and its time, one after the other."""
        ...


class TrackingSink(TrackingReceiver, Protocol):
    """What the driver tells: calls return at once and raise only when the disk refuses (StorageRefused)."""

    def close(self, timeout: float) -> int:
        """Deliver what is left for up to `timeout` seconds; returns how many messages stay for later."""
        ...
