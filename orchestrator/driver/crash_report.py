"""Sweeps ended by an error: traceback file, event in the history, and release of the name before the first trial."""

from __future__ import annotations

import time
import traceback
from contextlib import suppress
from pathlib import Path

from orchestrator import folders
from orchestrator.driver.parent_run import end_parent_run, open_sink, update_description
from orchestrator.errors import ExitCode, NameTaken, OrchestrateError, StorageRefused, SweepHeld, first_line
from orchestrator.execution.messages import is_disk_error
from orchestrator.folders import CRASH_FILES, CRASHED_SWEEPS, SweepFolder, create_sweep_folder, new_sweep_folder
from orchestrator.interfaces import SweepReporter
from orchestrator.redaction import redact
from orchestrator.study.study import Study
from orchestrator.study.trial_records import STOPPING
from trainer.results import TrialError
from trainer.storage.atomic_files import write_text

INTERNAL = "internal error: "
"""Prefix of the reason of a bug in the history."""
_DELIVERY_SECONDS = 10.0
_MAX_MESSAGE_LENGTH = 500
"""Characters."""


class InternalError(OrchestrateError):
    """A bug ended the driver; the traceback is in a file in the sweep's folder."""

    code = ExitCode.INTERNAL_ERROR

    def __init__(self, folder: SweepFolder, message: str, trace: Path) -> None:
        self.trace = trace
        next_step = (
            "No trial had started, so the name is free: `orchestrate sweep FILE` starts again"
            if is_name_free(folder)
            else f"Finished work is kept: orchestrate resume {folder.name}"
        )
        super().__init__(f"internal error: {message}\nThe traceback is in {trace}; please report it.\n{next_step}")


def record_crash(folder: SweepFolder, error: Exception, reporter: SweepReporter) -> Exception:
    """Record in the history and on the parent run that this error ended the driver.

    Nothing is recorded after SweepHeld, as another driver has taken over the sweep.

    Returns:
        The exception to raise: a bug as InternalError with its traceback in a file, any other error unchanged.
    """
    if isinstance(error, SweepHeld):
        return error
    is_bug = not isinstance(error, (OrchestrateError, TrialError)) and not is_disk_error(error)
    message = redact(f"{type(error).__name__}: {error}" if is_bug else str(error))
    if not is_bug and not (isinstance(error, OrchestrateError) and error.code is ExitCode.INTERNAL_ERROR):
        _record(folder, f"error: {_brief(message)}", reporter)
        return error
    trace = folder.path / time.strftime(CRASH_FILES.replace("*", "%Y%m%d-%H%M%S"))
    reason = f"{INTERNAL}{_brief(message)} (traceback in {trace})"
    write_text(trace, redact(f"{reason}\n\n{''.join(traceback.format_exception(error))}"))
    _record(folder, reason, reporter)
    return InternalError(folder, message, trace) if is_bug else error


def _record(folder: SweepFolder, reason: str, reporter: SweepReporter) -> None:
    if not Study.exists(folder):
        return
    # A full disk or a lost database: the error that is being recorded reports it already.
    with suppress(StorageRefused), Study.open(folder) as study:
        study.add_event(STOPPING, reason)
        sink = open_sink(study, folder.root, reporter)
        try:
            update_description(study, sink, reporter, "interrupted")
            end_parent_run(study, sink, "FAILED", "FAILED", reason)
        finally:
            sink.close(_DELIVERY_SECONDS)


def last_crash(folder: SweepFolder) -> str:
    """Return the reason of the last crash before the study existed; empty without one."""
    found = sorted(folder.path.glob(CRASH_FILES))
    return "" if not found else found[-1].read_text(encoding="utf-8").partition("\n")[0]


def crashed_at(folder: SweepFolder) -> float:
    """Return the time of the last crash, in seconds since the epoch; 0 without one."""
    return max((file.stat().st_mtime for file in folder.path.glob(CRASH_FILES)), default=0.0)


# --- the name --------------------------------------------------------------------------------------------------------


def is_name_free(folder: SweepFolder) -> bool:
    """Return whether a bug ended this sweep before its first trial, so that its name can be used again."""
    if not folder.spec.is_file() or folder.database.with_suffix(".url").is_file():
        return False  # a study in an external database still occupies the name
    if not Study.exists(folder):
        return last_crash(folder) != ""
    with Study.open(folder) as study:
        has_trials = bool(study.trials()) or any(trial.by_hand for trial in study.enqueued_trials())
        return not has_trials and study.stop_reason().startswith(INTERNAL)


def free_folder(root: Path, name: str) -> SweepFolder:
    """Return the folder of a new sweep.

    Raises:
        NameTaken: the folder exists, unless a bug ended its sweep before the first trial.
    """
    folder = SweepFolder(root, name)
    return folder if is_name_free(folder) and folders.lock_holder(folder) is None else new_sweep_folder(root, name)


def make_folder(folder: SweepFolder, spec: str) -> str:
    """Create the folder of a new sweep.

    The folder of a crashed sweep of this name is renamed, not removed.

    Returns:
        A notice about the renamed folder; empty without one.

    Raises:
        NameTaken: another process created the folder first.
    """
    if not folder.path.exists():
        create_sweep_folder(folder, spec)
        return ""
    with folders.sweep_lock(folder):
        if not is_name_free(folder):
            raise NameTaken(folder.name, folder.path)
        moved_to = (
            folder.root
            / CRASHED_SWEEPS
            / f"{folder.name}-{time.strftime('%Y%m%d-%H%M%S')}-{time.time_ns() % 10**6:06d}"
        )
        moved_to.parent.mkdir(exist_ok=True)
        folder.path.rename(moved_to)
        create_sweep_folder(folder, spec)
    return f"an earlier sweep {folder.name} crashed before its first trial; its folder was moved to {moved_to}"


def _brief(message: str) -> str:
    line = first_line(message)
    return line if len(line) <= _MAX_MESSAGE_LENGTH else f"{line[:_MAX_MESSAGE_LENGTH]}..."
