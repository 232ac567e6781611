"""Protocols through which the driver reports: `ProgressView`, `TrackingSink` and `SweepReporter`.

Views and reporter are implemented in dashboards, sinks in orchestrator.tracking. Every call of a sink is idempotent:
after a crash the driver may repeat it.
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
    """Shows a running sweep. Every call returns at once and has no effect on the sweep."""

    def set_activity(self, text: str) -> None:
        """Show the stage before the trials, such as data preparation."""
        ...

    def set_stage_progress(self, done: int, total: int) -> None:
        """Show how far the current stage is, in updates; drawn as a bar, never printed as a line."""
        ...

    def log(self, text: str) -> None:
        """Print a line that stays on the screen."""
        ...

    def set_total_updates(self, updates_of: UpdatesOf) -> None:
        """Pass the function from a trial's params to its number of updates, once known."""
        ...

    def change_spec(self, spec: SweepSpec, total: int | None) -> None:
        """Show a changed budget; `total`: trials of the sweep, None if unknown."""
        ...

    def update_trial(self, record: TrialRecord) -> None:
        """Show a trial that began, ended or gets another attempt."""
        ...

    def add_metrics(self, number: int, metrics: Sequence[StepMetrics]) -> None:
        """Show new metrics of trial `number`."""
        ...

    def refresh(self) -> None:
        """Redraw; called regularly while no report arrives."""
        ...

    def close(self) -> None:
        """Restore the terminal."""
        ...


@dataclass(frozen=True, slots=True)
class ReportFiles:
    """A sweep's report on disk. `description`: Markdown for the sweep's parent run in MLflow."""

    page: Path
    figures: Path
    description: str


class SweepReporter(Protocol):
    """Describes a sweep and writes its report; changes nothing. Implemented by `dashboards.sweep_reporter`."""

    def charts_view(self, spec: SweepSpec, sweep_id: str) -> tuple[str, str]:
        """Return key and value of the MLflow experiment tag that holds the saved view of charts."""
        ...

    def describe(self, study: Study, state: str, *, updates_of: UpdatesOf | None, diagnose: bool = True) -> str:
        """Return Markdown: progress and best trials and, with `diagnose`, findings and next steps.

        state: "running", "finished" or "interrupted"; updates_of: updates of a trial by its params, None where unknown.
        """
        ...

    def write_report(self, study: Study, state: str, *, updates_of: UpdatesOf | None) -> ReportFiles:
        """Write report.html and its figures to the sweep's folder."""
        ...

    def pair_values(
        self, study: Study, records: Sequence[TrialRecord], *, initial: bool = False
    ) -> Mapping[int, Sequence[float]]:
        """Return trial number -> the first objective on each held-out pair; without trials for which it is unknown.

        Empty if the trials' pairs are not the same. `initial`: under the initial model, as the trial has it.
        """
        ...


@dataclass(frozen=True, slots=True)
class Presentation:
    """The view and the reporter of a driver, composed by the command line."""

    open_view: Callable[[SweepSpec, int | None], ProgressView]
    """Opens a view from a spec and the number of its trials (None: unknown)."""
    reporter: SweepReporter


SWEEP_RUN = "sweep"
SFT_RUN = "sft"
"""Names of runs inside a sweep; the name of a trial's run is its number as text."""


class TrackingUnavailable(Exception):
    """The receiver cannot take messages now; retry the same message later."""


class MessageRejected(Exception):
    """The receiver rejects this message for good. It is moved to the rejected messages, and the next one is sent."""


class TrackingReceiver(Protocol):
    """Receives runs, metrics, tags and artifacts. `run` is "sweep", "sft" or the trial's number as text.

    `at` is a Unix time in seconds. Calls raise TrackingUnavailable or MessageRejected; any other exception is a bug.
    """

    def start_run(self, run: str, *, name: str, params: Mapping[str, Any], tags: Mapping[str, str], at: float) -> None:
        """Start a run, or continue it: then only new params and tags are set."""
        ...

    def log_metrics(self, run: str, metrics: Sequence[StepMetrics], *, at: float) -> None:
        """Log metrics at their steps; steps at or below the last one logged for this run are skipped."""
        ...

    def log_final_metrics(self, run: str, values: Mapping[str, float], *, step: int, at: float) -> None:
        """Log values that are no time series, such as win rates. A value equal to the run's newest is skipped."""
        ...

    def set_tags(self, run: str, tags: Mapping[str, str]) -> None:
        """Set tags."""
        ...

    def log_artifact(self, run: str, path: Path, folder: str = "") -> None:
        """Attach a file, under `folder` in the run's artifacts."""
        ...

    def end_run(self, run: str, *, status: str, tags: Mapping[str, str], at: float) -> None:
        """End a run with status FINISHED, FAILED or KILLED."""
        ...


@runtime_checkable
class BatchReceiver(Protocol):
    """A receiver that takes several metric messages of one run in one request."""

    def log_metric_history(self, run: str, history: Sequence[tuple[Sequence[StepMetrics], float]]) -> None:
        """Same as calling `log_metrics` with each of these metrics and times in order."""
        ...


@runtime_checkable
class ProbedReceiver(Protocol):
    """A receiver that can say whether it takes writes, so that a single bad message is not taken for an outage."""

    def probe(self) -> None:
        """Write something small. Raises TrackingUnavailable."""
        ...


class TrackingSink(TrackingReceiver, Protocol):
    """The driver's side of tracking: calls return at once and raise StorageRefused only if the disk refuses."""

    def close(self, timeout: float) -> int:
        """Deliver remaining messages for up to `timeout` seconds; return how many stay undelivered on disk."""
        ...
