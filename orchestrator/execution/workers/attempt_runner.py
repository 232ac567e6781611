"""`AttemptRunner`: one attempt at a trial in a worker process, whose reports the worker pulls. Independent of Ray."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from orchestrator.execution.messages import (
    WORKER_FILE,
    AttemptReport,
    AttemptResult,
    AttemptStatus,
    AttemptTask,
    DeviceFailed,
    WorkerLost,
    result_of_exception,
)
from orchestrator.execution.trainer_warnings import captured_warnings
from orchestrator.execution.workers.mirror_upload import MirrorUploader
from orchestrator.study.database import process_identity
from trainer.config.trial import TrialConfig
from trainer.environment import collecting_rarely
from trainer.metrics import EVAL_PREFIX
from trainer.results import RunResult, RunStatus, StepMetrics
from trainer.storage.file_lock import FileLock

REPORT_SECONDS = 0.5
"""Seconds for which metrics are collected into one report, to limit the load of the driver."""
_LOCK_SECONDS = 20.0
"""Seconds to wait for the trial's lock."""
_REMOTE_LOCK_SECONDS = 120.0
"""Seconds to wait for a holder on another machine; network disks free the locks of a dead machine after minutes."""
RELEASE_POLL_SECONDS = 0.2
"""Seconds between two checks for a release request."""


class Session(Protocol):
    """Training session of a worker, kept loaded between trials (trainer.training_session.TrainingSession)."""

    @property
    def counters(self) -> Mapping[str, int]:
        """How often models, data and caches were loaded."""
        ...

    def train(
        self, config: TrialConfig, folder: Path, earlier_attempts: Sequence[Path] = (), fork_folder: Path | None = None
    ) -> Generator[StepMetrics, None, RunResult]:
        """Train one configuration and yield its metrics; closing the generator stops it without a checkpoint.

        Args:
            config: the trial.
            folder: folder of the attempt.
            earlier_attempts: folders of earlier attempts, from whose newest checkpoint training continues.
            fork_folder: folder with another trial's checkpoint to start from.
        """
        ...

    def interrupt(self, *, checkpoint: bool = True) -> None:
        """Request the newest run to save a checkpoint, if `checkpoint`, and end as STOPPED.

        Thread-safe, no effect after its end.
        """
        ...


class SharingSession(Session, Protocol):
    """A training session with siblings that share its loaded, frozen data."""

    def sibling(self) -> Session:
        """Return another session in this process; trials in all of them take turns, report by report."""
        ...


SessionFactory = Callable[[Path], Session]


def open_session(cache: Path, *, trust_remote_code: bool = False) -> Session:
    """Open the trainer's session; imported here, so that only workers import torch."""
    with collecting_rarely():
        from trainer.training_session import TrainingSession

    return TrainingSession(cache, trust_remote_code=trust_remote_code)


class AttemptRunner:
    """Yields the reports of one attempt, until a result or `close`."""

    def __init__(
        self, task: AttemptTask, open_session: Callable[[], Session], *, lock_timeout: float = _LOCK_SECONDS
    ) -> None:
        """`lock_timeout`: seconds to wait for another process that trains the same trial."""
        self._task, self._open_session, self._lock_timeout = task, open_session, lock_timeout
        self._training: Generator[StepMetrics, None, RunResult] | None = None
        self._lock: FileLock | None = None
        self._uploader = None if task.mirror is None else MirrorUploader(task)
        self._ended = threading.Event()
        self._interrupting = threading.Lock()
        """Held while the session is interrupted, so that no interrupt arrives after this attempt's end."""

    def next_report(self) -> AttemptReport:
        """Return the next metrics: up to an evaluation, the end, or REPORT_SECONDS.

        Raises:
            WorkerLost: another process of the trial ended.
            DeviceFailed: a GPU failed, so that this process must end.
        """
        metrics: list[StepMetrics] = []
        result: AttemptResult | None = None
        warnings: list[str] = []
        try:
            with captured_warnings() as warnings:
                result = self._collect(metrics)
        except WorkerLost:
            self._abandon()
            raise
        except Exception as error:  # noqa: BLE001  the trial boundary: an exception becomes recorded data
            result = result_of_exception(error, self._task.folder)
            if result.status is AttemptStatus.LOST:
                self._abandon()
                raise DeviceFailed(result.reason) from None
        if result is not None:
            if self._uploader is not None and self._training is not None:
                self._uploader.finish(result)
            self._release_lock()
        return self._report(metrics, result, warnings)

    def close(self) -> None:
        """Stop the attempt at once, without a checkpoint."""
        if self._training is not None:
            self._training.close()
            if self._uploader is not None:
                self._uploader.cancel(finish_current=False)
        self._release_lock()

    def _abandon(self) -> None:
        if self._uploader is not None:
            self._uploader.cancel(finish_current=True)
        self._release_lock()

    def _report(self, metrics: list[StepMetrics], result: AttemptResult | None, warnings: list[str]) -> AttemptReport:
        counters = dict(self._open_session().counters) if self._training else {}
        notices: tuple[str, ...] = ()
        if self._uploader is not None:
            counters |= self._uploader.counters
            notices = self._uploader.take_notices()
        return AttemptReport(tuple(metrics), result, os.getpid(), counters, notices, tuple(warnings))

    def _collect(self, metrics: list[StepMetrics]) -> AttemptResult | None:
        until = time.monotonic() + REPORT_SECONDS
        if self._training is None:
            if self._task.release_requested:
                return AttemptResult(AttemptStatus.RELEASED, "release requested before the start")
            self._task.folder.mkdir(parents=True, exist_ok=True)
            (self._task.folder / WORKER_FILE).write_text(process_identity.process_id(), encoding="utf-8")
            session = self._open_session()
            self._lock = _acquire_lock(self._task, self._lock_timeout)
            if self._lock is None:
                return AttemptResult(AttemptStatus.RELEASED, "release requested while waiting for the trial's lock")
            config = TrialConfig.model_validate_json(self._task.config)
            earlier_attempts = (
                self._task.earlier_attempts if self._uploader is None else self._uploader.download_attempts()
            )
            self._training = session.train(config, self._task.folder, earlier_attempts, self._task.fork_folder)
            if self._uploader is not None:
                self._uploader.start()
            threading.Thread(target=self._watch_for_release, args=(session,), daemon=True).start()
        while True:
            try:
                step_metrics = next(self._training)
            except StopIteration as done:
                return _to_attempt_result(done.value)
            metrics.append(step_metrics)
            if any(name.startswith(EVAL_PREFIX) for name in step_metrics.metrics) or time.monotonic() >= until:
                return None

    def _watch_for_release(self, session: Session) -> None:
        """Thread during training: handle release requests and the death of the driver."""
        parent_pid = os.getppid()
        while not self._ended.wait(RELEASE_POLL_SECONDS):
            if os.getppid() != parent_pid:
                os._exit(1)  # Ray and the driver are dead; another attempt may start at any time
            if self._task.release_requested:
                with self._interrupting:
                    if not self._ended.is_set():
                        session.interrupt(checkpoint=self._task.wants_checkpoint)

    def _release_lock(self) -> None:
        with self._interrupting:
            self._ended.set()
        if self._lock is not None:
            self._lock.release()
            self._lock = None


def _to_attempt_result(result: RunResult) -> AttemptResult:
    match result.status:
        case RunStatus.FINISHED:
            kind = AttemptStatus.FINISHED
        case RunStatus.DIVERGED:
            kind = AttemptStatus.DIVERGED
        case RunStatus.STOPPED:  # on request: the trial has no outcome
            kind = AttemptStatus.RELEASED
    return AttemptResult(kind, result.reason, updates=result.updates)


def _acquire_lock(task: AttemptTask, timeout: float) -> FileLock | None:
    """Acquire the lock of the trial's folder; None where its release is requested before.

    A holder is the process of an older, abandoned attempt; it is killed after `timeout` seconds.
    """
    lock = FileLock(task.lock, process_identity.process_id())
    began = time.monotonic()
    until = began + timeout
    while not task.release_requested:
        if lock.acquire(timeout=0.1):
            return lock
        holder = lock.holder()
        if time.monotonic() <= until or holder is None:
            continue
        if process_identity.kill(holder):
            until = time.monotonic() + timeout
        elif not process_identity.is_remote(holder):
            raise TimeoutError(
                f"{task.lock}: {process_identity.holder_name(holder)} still trains this trial and was not killed; "
                "end it"
            )
        elif time.monotonic() > began + max(timeout, _REMOTE_LOCK_SECONDS):
            raise WorkerLost(
                f"{task.lock}: {process_identity.holder_name(holder)} still trains this trial; end it there"
            )
    return None
