"""MLflow runs that a driver left RUNNING because it was killed, or ended before MLflow got the last messages."""

from __future__ import annotations

import os
from collections.abc import Callable

from orchestrator import folders
from orchestrator.driver.parent_run import end_parent_run, open_sink, update_description
from orchestrator.errors import StorageRefused, SweepHeld
from orchestrator.folders import SweepFolder
from orchestrator.interfaces import SWEEP_RUN, SweepReporter
from orchestrator.study.database.study_database import has_own_database
from orchestrator.study.study import Study
from orchestrator.tracking.deferred_messages import is_run_open, open_runs
from orchestrator.tracking.outbox import OutboxLocked

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
