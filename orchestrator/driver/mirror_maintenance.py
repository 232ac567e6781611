"""Maintenance of the mirror by the driver: restores files on a new disk, deletes what retention removes locally.

Workers upload checkpoints and final models themselves (orchestrator/execution/workers/mirror_upload.py).
"""

from __future__ import annotations

import functools
import re
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue

from orchestrator.call_retries import retrying
from orchestrator.driver.checkpoint_retention import model_folder, models_to_keep
from orchestrator.errors import StorageRefused, SweepHeld
from orchestrator.execution.messages import MIRROR_EVENT
from orchestrator.execution.workers.mirror_download import FORK_ATTEMPT, download_result
from orchestrator.execution.workers.mirror_upload import RETRY_WAITS, model_files, result_files
from orchestrator.folders import DATA_FILE, SweepFolder
from orchestrator.interfaces import ProgressView
from orchestrator.mirror import CHECKPOINTS, MODEL, RESULT, SPEC, STUDY, TRIALS, Mirror, MirrorError, sweep_mirror
from orchestrator.redaction import redact
from orchestrator.spec.sweep_spec import SweepSpec
from orchestrator.study.study import Study
from orchestrator.study.trial_records import TrialRecord, TrialState

_PARALLEL_TRANSFERS = 8
"""Trials whose files are downloaded at the same time."""
_FINISH_TIMEOUT = 600.0
"""Seconds for the remaining tasks when all trials have ended."""
_MIN_FINISH_SECONDS = 20.0
"""Seconds for the remaining tasks of an interrupted sweep, whose machine may be reclaimed."""
_PATH_PATTERN = re.compile(rf"{TRIALS}/(\d+)/(\d+)/({CHECKPOINTS}|{MODEL}|{RESULT})(?:/|$)")


def claim_mirror(study: Study) -> None:
    """Write the sweep's id, spec and data report to its mirror, from which another disk can resume it.

    Raises:
        MirrorError: the mirror has another sweep of this name.
    """
    if study.spec.mirror is None:
        return
    sweep, folder = sweep_mirror(study.spec.mirror, study.spec.name), study.folder
    stored_id = sweep.read(STUDY)
    if stored_id is not None and stored_id.decode() != study.id:
        raise MirrorError(
            f"mirror: another sweep named {study.spec.name!r} has its files in {sweep.url}; remove them, or use "
            "another --name or mirror"
        )
    sweep.write(STUDY, study.id.encode())
    for name, file in ((DATA_FILE, folder.path / DATA_FILE), (SPEC, folder.spec)):
        sweep.write(name, file.read_bytes())


@contextmanager
def maintain_mirror(study: Study, view: ProgressView) -> Generator[MirrorMaintenance | None]:
    """Maintain the mirror while trials run; yields None where the sweep has no mirror."""
    if study.spec.mirror is None:
        yield None
        return
    maintenance = MirrorMaintenance(study, view)
    maintenance.restore()
    try:
        yield maintenance
    finally:
        maintenance.shut_down()


class MirrorMaintenance:
    """Runs mirror tasks in a thread, in order; failures are logged at the next call from the driver."""

    def __init__(self, study: Study, view: ProgressView, waits: Sequence[float] = RETRY_WAITS) -> None:
        assert study.spec.mirror is not None
        self._study, self._view, self._waits = study, view, tuple(waits)
        self._mirror = sweep_mirror(study.spec.mirror, study.spec.name)
        self._queue: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._failures: SimpleQueue[str] = SimpleQueue()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)
        self._thread.start()

    def restore(self) -> None:
        """Download results and best models of ended trials that this disk lacks, then reconcile both sides."""
        spec, folder, trials = self._study.spec, self._study.folder, self._study.trials()
        best = {record.number for record in models_to_keep(spec, trials)}
        complete = self._mirror.complete_paths(TRIALS)
        missing = [record for record in trials if record.state.is_final and _missing_files(folder, record, best)]
        if missing:
            self._view.set_activity(f"downloading results of {len(missing)} trials from {self._mirror.url}")
            with ThreadPoolExecutor(_PARALLEL_TRANSFERS) as pool:
                found = list(
                    pool.map(functools.partial(_download_trial, self._mirror, folder, complete, best), missing)
                )
            self._view.log(f"mirror: downloaded results of {sum(found)} of {len(missing)} ended trials")
        self._schedule_reconcile(trials, spec, folder)

    def on_removed(self, record: TrialRecord, model: bool) -> None:
        """Delete an ended trial's checkpoints in the mirror, with `model` also its weights; upload its result."""
        paths = [f"{TRIALS}/{record.number:04d}/{attempt}" for attempt in range(FORK_ATTEMPT, record.attempts + 1)]
        self._queue.put(lambda: self._remove(paths, model))
        if record.state is not TrialState.COMPLETE:
            folder = self._study.folder
            self._queue.put(lambda: self._upload_result(folder, record))
        self._log_failures()

    def shut_down(self) -> None:
        """Reconcile both sides and finish the remaining tasks within a time limit; the next driver does the rest.

        Does nothing where another driver has taken over.
        """
        if self._is_fenced():
            self._queue.put(None)
            return
        trials = self._study.trials()
        self._schedule_reconcile(trials, self._study.spec, self._study.folder)
        self._queue.put(None)
        self._view.set_activity("cleaning up the mirror")
        over = all(record.state.is_final for record in trials)
        self._thread.join(_FINISH_TIMEOUT if over else _MIN_FINISH_SECONDS)
        if self._thread.is_alive():
            self._closing.set()
            self._failures.put("cleanup was not finished before the sweep's end; the next resume continues it")
        self._log_failures()

    # --- the thread ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while (task := self._queue.get()) is not None:
            if self._is_fenced():
                return  # the newer driver maintains the mirror
            try:
                retrying(self._waits, cancelled=self._closing)(task)
            except Exception as error:  # noqa: BLE001 - reported, and the thread continues with the next task
                self._failures.put(redact(f"given up after {len(self._waits) + 1} tries: {error}"))

    def _is_fenced(self) -> bool:
        try:
            self._study.check_fence()
        except SweepHeld:
            return True
        except StorageRefused:
            return self._study.fenced  # the driver's own writes will report the error
        return False

    def _log_failures(self) -> None:
        for _ in range(self._failures.qsize()):
            message = self._failures.get()
            self._study.add_event(MIRROR_EVENT, message)
            self._view.log(f"mirror: {message}")

    def _schedule_reconcile(self, trials: Sequence[TrialRecord], spec: SweepSpec, folder: SweepFolder) -> None:
        ended = {record.number: record for record in trials if record.state.is_final}
        best = {record.number for record in models_to_keep(spec, trials)}
        self._queue.put(lambda: self._reconcile(ended, best, folder))

    def _reconcile(self, ended: dict[int, TrialRecord], best: set[int], folder: SweepFolder) -> None:
        """Remove what ended trials no longer need, including incomplete uploads; upload missing results and models."""
        existing: set[str] = set()
        for file in self._mirror.files(TRIALS):
            if (match := _PATH_PATTERN.match(file)) is not None and int(match[1]) in ended:
                existing.add(match[0].rstrip("/"))
        for path in sorted(existing):
            match = _PATH_PATTERN.match(path)
            assert match is not None
            if match[3] == CHECKPOINTS or (match[3] == MODEL and int(match[1]) not in best):
                self._mirror.remove(path)
        complete = set(self._mirror.complete_paths(TRIALS))
        for number, record in ended.items():
            model = model_folder(folder, record) if number in best else None
            if model is not None and f"{TRIALS}/{number:04d}/{model.parent.name}/{MODEL}" not in complete:
                self._mirror.put(f"{TRIALS}/{number:04d}/{model.parent.name}/{MODEL}", model_files(model.parent))
            if not any(f"{TRIALS}/{number:04d}/{k}/{RESULT}" in complete for k in range(1, record.attempts + 1)):
                self._upload_result(folder, record)

    def _remove(self, paths: Sequence[str], model: bool) -> None:
        for path in paths:
            self._mirror.remove(f"{path}/{CHECKPOINTS}")
            if model:
                self._mirror.remove(f"{path}/{MODEL}")

    def _upload_result(self, folder: SweepFolder, record: TrialRecord) -> None:
        files = result_files(folder.attempt(record.number, record.attempts))
        if files:
            self._mirror.put(f"{TRIALS}/{record.number:04d}/{record.attempts}/{RESULT}", files)


def _missing_files(folder: SweepFolder, record: TrialRecord, best: set[int]) -> bool:
    if record.number in best and model_folder(folder, record) is None:
        return True
    return not any(result_files(folder.attempt(record.number, k)) for k in range(1, record.attempts + 1))


def _download_trial(
    mirror: Mirror, folder: SweepFolder, complete: Sequence[str], best: set[int], record: TrialRecord
) -> bool:
    """Download the result of the newest attempt that has one; return whether there was one."""
    trial = f"{TRIALS}/{record.number:04d}"
    for attempt in range(record.attempts, 0, -1):
        if f"{trial}/{attempt}/{RESULT}" in complete:
            with_model = record.number in best and f"{trial}/{attempt}/{MODEL}" in complete
            to: Path = folder.attempt(record.number, attempt)
            return download_result(mirror.at(trial), attempt, to, model=with_model)
    return False
