"""The sweep's parent run in MLflow: start, description, final report, end.

The parent run has the settings, environment and data that all trials share. Its description has the sweep's state, the
diagnosis and the judgements. The report is written into the sweep's folder and attached to the run. Runs that a driver
left RUNNING, because it was killed or ended before MLflow got the last messages, are ended by `end_orphaned_runs`.
"""

from __future__ import annotations

import functools
import json
import os
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

from orchestrator import folders
from orchestrator.driver.checkpoint_retention import model_folder
from orchestrator.driver.data_stage import load_data_report, updates_if_known
from orchestrator.errors import StorageRefused, SweepHeld
from orchestrator.execution.stop_reasons import StopKind, StopReason
from orchestrator.execution.trainer_warnings import WARNINGS_TAG, recorded_warnings
from orchestrator.folders import DATA_FILE, ENVIRONMENT_FILE, RUNS_FILE, SweepFolder
from orchestrator.interfaces import SWEEP_RUN, ProgressView, SweepReporter, TrackingSink
from orchestrator.redaction import redact
from orchestrator.spec.loading.serialization import sweep_identity
from orchestrator.spec.sweep_spec import SweepSpec
from orchestrator.study.database.study_database import has_own_database
from orchestrator.study.retried_trials import never_trained, numbers_text
from orchestrator.study.study import Study
from orchestrator.study.trial_records import TrialState, requirements_text
from orchestrator.tracking.deferred_messages import is_run_open, open_runs
from orchestrator.tracking.mlflow_receiver import MlflowReceiver
from orchestrator.tracking.outbox import Outbox, OutboxLocked
from orchestrator.tracking.run_metadata import NOTE, environment, environment_tags
from orchestrator.tracking.tracking_store import sweep_tracking_uri
from trainer.config.trial import flatten
from trainer.storage.atomic_files import write_json

_LOCK_SECONDS = 30.0
"""Seconds to wait for a command that delivers the messages of a driver that was killed."""


def open_sink(
    study: Study,
    root: Path,
    reporter: SweepReporter,
    *,
    fence: Callable[[], None] | None = None,
    patience: float = 0.0,
) -> Outbox:
    """Return an outbox in the sweep's folder that delivers to its MLflow server.

    Args:
        study: the study.
        root: the runs folder.
        reporter: has the sweep's charts in MLflow.
        fence: raises SweepHeld once another driver writes; by default the study's. A command that is no driver gives
            its own, and does not wait for another process that delivers.
        patience: seconds for which delivery waits for the first metrics.
    """
    tracking = study.spec.tracking
    uri = sweep_tracking_uri(study.folder, tracking.uri)
    receiver = MlflowReceiver(
        root,
        uri=uri,
        experiment=tracking.experiment,
        artifacts=tracking.artifacts,
        sweep_id=study.id,
        sweep=study.spec.name,
        on_run=functools.partial(_record_run_id, study.folder),
        view=reporter.charts_view(study.spec, study.id),
    )
    if fence is not None:
        return Outbox(study.folder.outbox, receiver, fence=fence)
    return Outbox(study.folder.outbox, receiver, fence=study.check_fence, lock_timeout=_LOCK_SECONDS, patience=patience)


def start_parent_run(
    study: Study, sink: TrackingSink, reporter: SweepReporter, fingerprint: str, adapters: Sequence[str] = ()
) -> None:
    """Start or restart the parent run with the resolved sweep file, the environment and the data report.

    Args:
        study: the study.
        sink: the tracking sink.
        reporter: returns the run's description.
        fingerprint: fingerprint of the data.
        adapters: notices about the layers that adapters train, for the tag `lora.adapts`.
    """
    folder, spec = study.folder, study.spec
    found = environment()
    path = folder.path / ENVIRONMENT_FILE
    write_json(path, found)
    report = load_data_report(folder)
    tags = {} if report is None else {f"data.{name}": str(count) for name, count in report.counts().items()}
    tags |= {
        "state": "RUNNING",
        "reason": "",
        "spec.hash": sweep_identity(spec),
        "data.fingerprint": fingerprint,
        "goal": f"{spec.first_objective.direction} {spec.first_objective.metric}",
        **({"goals": ", ".join(f"{each.direction} {each.metric}" for each in spec.objectives)} if spec.also else {}),
        NOTE: reporter.describe(study, "running", updates_of=None, diagnose=False),
    }
    if adapters:
        tags["lora.adapts"] = "\n".join(adapters)
    if warned := recorded_warnings(study):  # by earlier drivers
        tags[WARNINGS_TAG] = "\n".join(warned)
    sink.start_run(SWEEP_RUN, name=spec.name, params=_params(spec), tags=tags | environment_tags(found), at=time.time())
    for file in (folder.spec, path, folder.path / DATA_FILE):
        sink.log_artifact(SWEEP_RUN, file)


def apply_changed_requirements(study: Study, sink: TrackingSink) -> list[str]:
    """Tag the ended trials' runs by the requirements, where a resume has changed them; return notices."""
    if len({json.dumps(json.loads(version.text).get("require", [])) for version in study.spec_history()}) == 1:
        return []
    for record in study.trials():
        if record.state is TrialState.COMPLETE:
            sink.set_tags(str(record.number), {"breaks": "; ".join(record.breaks) or "none"})
    best = study.best()
    if best is None or model_folder(study.folder, best) is not None:
        return []
    return [
        f"by the changed requirements trial {best.number} is the best, and its weights were removed when it was not"
    ]


def end_parent_run(
    study: Study, sink: TrackingSink, state: str, status: str, reason: str, *, at: float | None = None
) -> None:
    """End the parent run; a later resume restarts it. `at`: the time of its end, by default now."""
    best = study.best()
    failed = never_trained(study.trials())
    tags = {"state": state, "reason": reason, "failed.trials": numbers_text(failed) or "none"}
    if study.spec.require and (ranked := study.ranked()):
        tags["requirements"] = requirements_text(ranked) or "kept by every complete trial"
        if best is None and len(study.spec_history()) > 1:  # there may have been one by other bounds
            tags |= {"best.trial": "none", "best.value": "none"}
    if study.spec.also:
        tags["front.trials"] = ", ".join(record.label for record in study.pareto_front()) or "none"
    if best is not None:
        tags |= {"best.trial": str(best.number), "best.value": f"{best.value}"}
        tags |= {"best.seeds": str(best.complete_seeds)} if best.seeds else {}
        tags |= {"best.interval": f"{best.interval[0]} to {best.interval[1]}"} if best.interval is not None else {}
        tags |= {f"best.{path}": str(value) for path, value in best.params.items()}
    sink.end_run(SWEEP_RUN, status=status, tags=tags, at=time.time() if at is None else at)


def _record_run_id(folder: SweepFolder, run: str, run_id: str) -> None:
    """Store MLflow's run ids in the sweep's folder, so that `status` needs no MLflow."""
    path = folder.path / RUNS_FILE
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if known.get(run) != run_id:
        write_json(path, known | {run: run_id})


def _params(spec: SweepSpec) -> dict[str, Any]:
    """Return the run's params: sampler, objective and searched paths; settings of `base` belong to the trials."""
    tree = spec.model_dump(mode="json", include={"sampler", "goal"})
    searched = {"search": list(spec.search.paths)}
    return flatten(tree) | searched


REPORT_FAILURE_FILE = "report-failure.txt"


def update_description(study: Study, sink: TrackingSink, reporter: SweepReporter, state: str = "running") -> None:
    """Update the run's description, with the diagnosis once a trial is complete."""
    text, error = _describe(study, reporter, state)
    if error is not None:
        record_page_failure(study, "diagnosis", error)
    sink.set_tags(SWEEP_RUN, {NOTE: text})


def _describe(study: Study, reporter: SweepReporter, state: str) -> tuple[str, Exception | None]:
    """Return the description, without the diagnosis where that fails, and its error."""
    updates_of = updates_if_known(study.folder, study.spec)
    try:
        return reporter.describe(study, state, updates_of=updates_of), None
    except Exception as error:  # noqa: BLE001 - a bug in a diagnosis rule must not stop the sweep; it is recorded
        return reporter.describe(study, state, updates_of=updates_of, diagnose=False), error


_DESCRIPTION_SECONDS = 10.0
"""Seconds. Minimum time between two updates of the description."""
_DESCRIPTION_TIME_FRACTION = 0.01
"""Maximum share of the time in which a description is prepared; each takes longer with more trials."""


class RunningDescription:
    """The description of a running sweep, prepared in a thread with a connection of its own.

    A diagnosis takes up to seconds (imports, bootstrap), in which the driver's loop could not answer its trials. A
    context manager that waits for the thread; the text of a sweep that ends comes from the final report.
    """

    def __init__(self, study: Study, sink: TrackingSink, reporter: SweepReporter) -> None:
        self._study, self._sink, self._reporter = study, sink, reporter
        self._thread: threading.Thread | None = None
        self._prepared: tuple[str, Exception | None] | None = None
        self._error: Exception | None = None
        self._next = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread is not None:
            self._thread.join()

    def update(self) -> None:
        """Send what is prepared, and begin the next where it is due. Does not wait."""
        if self._thread is not None:
            if self._thread.is_alive():
                return
            self._send()
        if time.monotonic() >= self._next:
            self._thread = threading.Thread(target=self._prepare, name="description of the sweep", daemon=True)
            self._thread.start()

    def _send(self) -> None:
        prepared, error, self._prepared, self._error, self._thread = self._prepared, self._error, None, None, None
        if prepared is not None:
            text, error = prepared
            self._sink.set_tags(SWEEP_RUN, {NOTE: text})
        if error is not None:
            record_page_failure(self._study, "diagnosis", error)

    def _prepare(self) -> None:
        began = time.monotonic()
        try:
            with Study.open(self._study.folder, read_only=True) as study:
                self._prepared = _describe(study, self._reporter, "running")
        except Exception as error:  # noqa: BLE001 - recorded by `_send`, in the thread that writes to the study
            self._error = error
        took = time.monotonic() - began
        self._next = began + max(_DESCRIPTION_SECONDS, took / _DESCRIPTION_TIME_FRACTION)


def record_page_failure(study: Study, what: str, reason: Exception) -> str:
    """Record a failed page in the history and its traceback in a file; return a one-line message."""
    text = redact(f"{type(reason).__name__}: {reason}")
    path = study.folder.path / REPORT_FAILURE_FILE
    path.write_text(redact("".join(traceback.format_exception(reason))), encoding="utf-8")
    study.add_event(f"{what} failed", text)
    return f"{text}; the traceback is in {path}"


class DraftReport:
    """The report as it is while the last trials train, written once in a thread, with a connection of its own.

    A sweep whose driver is killed at the end has a report, and the final one takes a fraction of the time: what draws
    it is imported, and the scripts of the page are packed.
    """

    def __init__(self, folder: SweepFolder, spec: SweepSpec, reporter: SweepReporter) -> None:
        self._folder, self._spec, self._reporter = folder, spec, reporter
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def start(self) -> None:
        """Start writing; repeated calls have no effect."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._write, name="draft of the report", daemon=True)
            self._thread.start()

    def wait(self, study: Study) -> None:
        """Wait for the end; a failure is recorded in the history, and the final report is tried nevertheless."""
        if self._thread is not None:
            self._thread.join()
        if self._error is not None:
            record_page_failure(study, "draft of the report", self._error)

    def _write(self) -> None:
        try:
            with Study.open(self._folder, read_only=True) as study:
                self._reporter.write_report(study, "running", updates_of=updates_if_known(self._folder, self._spec))
        except Exception as error:  # noqa: BLE001 - recorded by `wait`, in the thread that writes to the study
            self._error = error


FINAL_STOPS = frozenset(
    {StopKind.FINISHED, StopKind.OUT_OF_BUDGET, StopKind.TARGET, StopKind.SAME_BUG, StopKind.ABANDONED}
)


def write_final_report(
    study: Study, sink: TrackingSink, view: ProgressView, reporter: SweepReporter, stop_reason: StopReason
) -> None:
    """Write report.html and attach it; for an interrupted sweep, only update the description."""
    if not study.trials():
        return
    if stop_reason.kind not in FINAL_STOPS:
        update_description(study, sink, reporter, "interrupted")
        return
    view.set_activity("writing the report")
    attach_report(
        study, sink, reporter, view.log, "finished" if stop_reason.kind is StopKind.FINISHED else "interrupted"
    )


def attach_report(
    study: Study, sink: TrackingSink, reporter: SweepReporter, log: Callable[[str], None], state: str
) -> None:
    """Write report.html and its figures, attach them to the parent run, update its description.

    `state`: the sweep's state in report and description.
    """
    try:
        files = reporter.write_report(study, state, updates_of=updates_if_known(study.folder, study.spec))
    except Exception as error:  # noqa: BLE001 - a bug in the report must not stop the sweep; it is recorded
        failure = record_page_failure(study, "report", error)
        log(f"the report could not be written ({failure}); try orchestrate report {study.spec.name}")
        update_description(study, sink, reporter, state)
        return
    sink.log_artifact(SWEEP_RUN, files.page)
    sink.log_artifact(SWEEP_RUN, files.figures, "figures")
    sink.set_tags(SWEEP_RUN, {NOTE: files.description})


_DELIVERY_SECONDS = 20.0
_KILLED = "the driver ended without saying why: it was killed, or its machine stopped"


def end_orphaned_runs(folder: SweepFolder, reporter: SweepReporter, log: Callable[[str], None]) -> None:
    """End the runs of a sweep in MLflow that no driver continues, as KILLED with the state INTERRUPTED.

    Called by commands that look at a sweep. Does nothing while a driver runs, or where this user may not write. The
    messages are on disk before they are delivered; what cannot be delivered now waits for the next command or driver.
    """
    written = (folder.outbox, folder.path, folder.root)
    if not is_run_open(folder.outbox, SWEEP_RUN) or not all(os.access(path, os.W_OK) for path in written):
        return
    if folders.lock_holder(folder) is not None or not Study.exists(folder):
        return
    try:
        with Study.open(folder) as study:
            if not has_own_database(folder) and not study.driver_has_ended():
                return  # on another machine, as far as this one can tell
            _end_runs(study, reporter, log)
    except (OutboxLocked, SweepHeld):
        return  # another command does it, or a driver began


def _end_runs(study: Study, reporter: SweepReporter, log: Callable[[str], None]) -> None:
    folder = study.folder

    def fence() -> None:
        if (holder := folders.lock_holder(folder)) is not None:
            raise SweepHeld(folder.name, holder)

    try:
        sink = open_sink(study, folder.root, reporter, fence=fence)
    except OutboxLocked:
        raise
    except StorageRefused as error:
        log(f"the runs of {folder.name} in MLflow cannot be ended: {error}")
        return
    try:
        runs = open_runs(folder.outbox)
        for run in runs:
            if run != SWEEP_RUN:
                sink.end_run(run, status="KILLED", tags={"state": "INTERRUPTED"}, at=0.0)  # at the last message's time
        if SWEEP_RUN in runs:
            update_description(study, sink, reporter, "interrupted")
            end_parent_run(study, sink, "INTERRUPTED", "KILLED", study.stop_reason() or _KILLED, at=0.0)
    finally:
        left = sink.close(_DELIVERY_SECONDS)
    text = f"the driver of {folder.name} has ended: its runs in MLflow are marked as interrupted"
    log(f"{text}; {left} messages wait for MLflow" if left else text)
