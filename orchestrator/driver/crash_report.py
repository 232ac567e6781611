"""A sweep ended by an error: the traceback it leaves, and its name, free again where no trial had begun."""

from __future__ import annotations

import time
import traceback
from contextlib import suppress
from pathlib import Path

from orchestrator import folders
from orchestrator.driver.parent_run import end_parent_run, open_sink, update_description
from orchestrator.errors import ExitCode, NameTaken, OrchestrateError, StorageRefused, SweepHeld
from orchestrator.execution.messages import is_disk_error
from orchestrator.folders import ASIDE, CRASH_FILES, SweepFolder, create_sweep_folder, new_sweep_folder
from orchestrator.interfaces import SweepReporter
from orchestrator.redaction import redact
from orchestrator.study.study import Study
from orchestrator.study.trial_records import STOPPING
from trainer.results import TrialError
from trainer.storage.atomic_files import write_text

INTERNAL = "internal error: "
"""How a reason in the history begins that no user can put right."""
_DELIVERY_SECONDS = 10.0
_LONGEST = 500


class InternalError(OrchestrateError):
    """A bug that ended the driver; its traceback lies beside the study."""

    code = ExitCode.INTERNAL_ERROR

    def __init__(self, folder: SweepFolder, message: str, trace: Path) -> None:
        self.trace = trace
        after = (
            "No trial had begun, so the name is free: `orchestrate sweep FILE` begins anew"
            if is_free(folder)
            else f"What was done is kept: orchestrate resume {folder.name}"
        )
        super().__init__(f"internal error: {message}\nThe traceback is in {trace}; please report it.\n{after}")


def leave_trace(folder: SweepFolder, error: Exception, reporter: SweepReporter) -> Exception:
    """Record that this error ended the driver, in the history and on the parent run in tracking; what to raise for it.

    An error that is a user's to answer is returned as it is, a bug as InternalError with its traceback in a file. A
    driver that another one has replaced records nothing: the sweep is no longer its own.
    """
    if isinstance(error, SweepHeld):
        return error
    bug = not isinstance(error, (OrchestrateError, TrialError)) and not is_disk_error(error)
    message = redact(f"{type(error).__name__}: {error}" if bug else str(error))
    if not bug and not (isinstance(error, OrchestrateError) and error.code is ExitCode.INTERNAL_ERROR):
        _record(folder, f"error: {_first_line(message)}", reporter)
        return error
    trace = folder.path / time.strftime(CRASH_FILES.replace("*", "%Y%m%d-%H%M%S"))
    reason = f"{INTERNAL}{_first_line(message)} (traceback in {trace})"
    write_text(trace, redact(f"{reason}\n\n{''.join(traceback.format_exception(error))}"))
    _record(folder, reason, reporter)
    return InternalError(folder, message, trace) if bug else error


def _record(folder: SweepFolder, reason: str, reporter: SweepReporter) -> None:
    if not Study.exists(folder):
        return
    # A full disk or a database that is gone: the error that is being recorded says so itself.
    with suppress(StorageRefused), Study.open(folder) as study:
        study.add_event(STOPPING, reason)
        sink = open_sink(study, folder.root, reporter)
        try:
            update_description(study, sink, reporter, "interrupted")
            end_parent_run(study, sink, "FAILED", "FAILED", reason)
        finally:
            sink.close(_DELIVERY_SECONDS)


def last_crash(folder: SweepFolder) -> str:
    """Why the driver ended that got no further than before the study was made; empty where there was none."""
    found = sorted(folder.path.glob(CRASH_FILES))
    return "" if not found else found[-1].read_text(encoding="utf-8").partition("\n")[0]


def crashed_at(folder: SweepFolder) -> float:
    """When that was, in seconds since 1970."""
    return max((file.stat().st_mtime for file in folder.path.glob(CRASH_FILES)), default=0.0)


# --- the name --------------------------------------------------------------------------------------------------------


def is_free(folder: SweepFolder) -> bool:
    """Whether a bug ended this sweep before its first trial, so that another one may have its name."""
    if not folder.spec.is_file() or folder.database.with_suffix(".url").is_file():
        return False  # a study in another database stays there, and keeps the name
    if not Study.exists(folder):
        return last_crash(folder) != ""
    with Study.open(folder) as study:
        begun = bool(study.trials()) or any(given.by_hand for given in study.enqueued_trials())
        return not begun and study.stop_reason().startswith(INTERNAL)


def free_folder(root: Path, name: str) -> SweepFolder:
    """The folder of a sweep to begin: nothing is there, or what a bug ended before the first trial. NameTaken else."""
    folder = SweepFolder(root, name)
    return folder if is_free(folder) and folders.lock_holder(folder) is None else new_sweep_folder(root, name)


def make_folder(folder: SweepFolder, spec: str) -> str:
    """Make the folder of a new sweep; a sentence about the crashed one whose name it takes, empty where none was there.

    What that one left is moved aside, not removed. NameTaken where somebody else was quicker.
    """
    if not folder.path.exists():
        create_sweep_folder(folder, spec)
        return ""
    with folders.sweep_lock(folder):
        if not is_free(folder):
            raise NameTaken(folder.name, folder.path)
        temporary = folder.root / ASIDE / f"{folder.name}-{time.strftime('%Y%m%d-%H%M%S')}-{time.time_ns() % 10**6:06d}"
        temporary.parent.mkdir(exist_ok=True)
        folder.path.rename(temporary)
        create_sweep_folder(folder, spec)
    return f"a sweep {folder.name} had crashed before its first trial; what it left was moved to {temporary}"


def _first_line(text: str) -> str:
    lines = text.strip().splitlines() or ["no message"]
    return lines[0] if len(lines[0]) <= _LONGEST else f"{lines[0][:_LONGEST]}..."
