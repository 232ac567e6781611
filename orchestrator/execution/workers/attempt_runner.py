"""`AttemptRunner`: one attempt at a trial in a worker process; its reports are pulled. Knows no Ray."""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import IO, Protocol

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
from orchestrator.study.database import driver_lease
from trainer.config.trial import TrialConfig
from trainer.metrics import EVAL
from trainer.results import RunResult, RunStatus, StepMetrics

GROUP_SECONDS = 0.5
"""Training points are gathered this long, so that fast steps do not flood the driver."""
_LOCK_SECONDS = 20.0
_REMOTE_LOCK_SECONDS = 120.0
"""For a holder on another machine: a network disk frees the locks of a dead machine after a minute or two."""
STOP_POLL_SECONDS = 0.2


class Session(Protocol):
    """What stays loaded in a worker between trials: trainer.training_session.TrainingSession, or a script in tests."""

    @property
    def counters(self) -> Mapping[str, int]:
        """What was loaded, and how often."""
        ...

    def train(
        self, config: TrialConfig, folder: Path, earlier: Sequence[Path] = (), fork: Path | None = None
    ) -> Generator[StepMetrics, None, RunResult]:
        """Train one configuration, from another run's checkpoint in `fork` where that is given. Closing the generator
        stops it at once and saves nothing."""
        ...

    def interrupt(self) -> None:
        """Have the run that `train` was called for last save a checkpoint and end as STOPPED; from any thread.

        Nothing happens where that run is over: the next one knows nothing of it.
        """
        ...


class SharingSession(Session, Protocol):
    """A training session that others may stand beside: they share what is loaded and does not change."""

    def sibling(self) -> Session:
        """Another one in this process; trials in all of them go on in turn, a point at a time."""
        ...


SessionFactory = Callable[[Path], Session]


def open_session(cache: Path, *, trust_remote_code: bool = False) -> Session:
    """The trainer's own; imported here, so that only workers pay for torch."""
    from trainer.training_session import TrainingSession

    return TrainingSession(cache, trust_remote_code=trust_remote_code)


class AttemptRunner:
    """Points and the end of one attempt. After an end, or `close`, there is nothing more to pull."""

    def __init__(
        self, task: AttemptTask, open_session: Callable[[], Session], *, lock_timeout: float = _LOCK_SECONDS
    ) -> None:
        """`lock_timeout`: seconds to wait for another process that works in the same place."""
        self._task, self._open_session, self._lock_timeout = task, open_session, lock_timeout
        self._metrics: Generator[StepMetrics, None, RunResult] | None = None
        self._lock: IO[str] | None = None
        self._uploader = None if task.mirror is None else MirrorUploader(task)
        self._is_over = threading.Event()
        self._interrupting = threading.Lock()
        """Held while the training session is interrupted: never for this attempt's sake once its run is over."""

    def next_report(self) -> AttemptReport:
        """The next points: until an evaluation, the end, or half a second. WorkerLost is nobody's to record here;
        DeviceFailed, one of these, where this very process has to end."""
        metrics: list[StepMetrics] = []
        result: AttemptResult | None = None
        warnings: list[str] = []
        try:
            with captured_warnings() as warnings:
                result = self._collect(metrics)
        except WorkerLost:
            self._lose()
            raise
        except Exception as error:  # noqa: BLE001  the trial boundary: an exception becomes recorded data
            result = result_of_exception(error, self._task.folder)
            if result.status is AttemptStatus.LOST:
                self._lose()
                raise DeviceFailed(result.reason) from None
        if result is not None:
            if self._uploader is not None and self._metrics is not None:
                self._uploader.finish(result)
            self._release_lock()
        return self._report(metrics, result, warnings)

    def close(self) -> None:
        """Stop here: the driver has decided."""
        if self._metrics is not None:
            self._metrics.close()
            if self._uploader is not None:
                self._uploader.cancel(is_wanted=False)
        self._release_lock()

    def _lose(self) -> None:
        if self._uploader is not None:
            self._uploader.cancel(is_wanted=True)
        self._release_lock()

    def _report(self, metrics: list[StepMetrics], result: AttemptResult | None, warnings: list[str]) -> AttemptReport:
        counters = dict(self._open_session().counters) if self._metrics else {}
        notices: tuple[str, ...] = ()
        if self._uploader is not None:
            counters |= self._uploader.counters
            notices = self._uploader.take_notices()
        return AttemptReport(tuple(metrics), result, os.getpid(), counters, notices, tuple(warnings))

    def _collect(self, metrics: list[StepMetrics]) -> AttemptResult | None:
        until = time.monotonic() + GROUP_SECONDS
        if self._metrics is None:
            if self._task.stop_requested:
                return AttemptResult(AttemptStatus.RELEASED, "asked to stop before it began")
            self._task.folder.mkdir(parents=True, exist_ok=True)
            (self._task.folder / WORKER_FILE).write_text(driver_lease.process_id(), encoding="utf-8")
            session = self._open_session()
            self._lock = _acquire_lock(self._task, self._lock_timeout)
            if self._lock is None:
                return AttemptResult(AttemptStatus.RELEASED, "asked to stop before it began")
            config = TrialConfig.model_validate_json(self._task.config)
            earlier = self._task.earlier if self._uploader is None else self._uploader.download_attempts()
            self._metrics = session.train(config, self._task.folder, earlier, self._task.fork)
            if self._uploader is not None:
                self._uploader.start()
            threading.Thread(target=self._watch_for_stop, args=(session,), daemon=True).start()
        while True:
            try:
                step_metrics = next(self._metrics)
            except StopIteration as done:
                return _to_attempt_result(done.value)
            metrics.append(step_metrics)
            if any(name.startswith(EVAL) for name in step_metrics.metrics) or time.monotonic() >= until:
                return None

    def _watch_for_stop(self, session: Session) -> None:
        """Beside the training: the driver may want the trial back, or be dead."""
        ray = os.getppid()
        while not self._is_over.wait(STOP_POLL_SECONDS):
            if os.getppid() != ray:
                os._exit(1)  # Ray is gone, and the driver with it: another attempt may begin any moment
            if self._task.stop_requested:
                with self._interrupting:
                    if not self._is_over.is_set():
                        session.interrupt()

    def _release_lock(self) -> None:
        with self._interrupting:
            self._is_over.set()
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def _to_attempt_result(result: RunResult) -> AttemptResult:
    match result.status:
        case RunStatus.FINISHED:
            kind = AttemptStatus.FINISHED
        case RunStatus.DIVERGED:
            kind = AttemptStatus.DIVERGED
        case RunStatus.STOPPED:  # somebody wanted it back: no outcome of the trial
            kind = AttemptStatus.RELEASED
    return AttemptResult(kind, result.reason, steps=result.steps)


def _acquire_lock(task: AttemptTask, timeout: float) -> IO[str] | None:
    """The lock of the trial's folder; None when the driver wants the trial back before that.

    Whoever holds it works on an older attempt, which nobody listens to any more: given time to end, it is ended.
    """
    task.lock.parent.mkdir(parents=True, exist_ok=True)
    lock_file = task.lock.open("a+", encoding="utf-8")
    began = time.monotonic()
    until = began + timeout
    while not task.stop_requested:
        try:
            fcntl.flock(lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until:
                holder = task.lock.read_text(encoding="utf-8")
                if driver_lease.kill(holder):
                    until = time.monotonic() + timeout
                    continue
                if not driver_lease.is_remote(holder):
                    lock_file.close()
                    raise TimeoutError(f"another process still works on this trial ({task.lock})") from None
                if time.monotonic() > began + max(timeout, _REMOTE_LOCK_SECONDS):
                    lock_file.close()
                    raise WorkerLost(
                        f"{driver_lease.holder_name(holder)} still works on this trial ({task.lock})"
                    ) from None
            time.sleep(0.1)
        else:
            lock_file.truncate(0)
            lock_file.write(driver_lease.process_id())
            lock_file.flush()
            return lock_file
    lock_file.close()
    return None
