"""`SharedWorker`: a Ray actor in which several trials take turns over one frozen base model.

`SharedWorkerPool` assigns trials to these processes in the driver. `ProxyTrainable` is Ray Tune's worker of such a
trial.
"""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import ray
from ray.exceptions import ActorUnavailableError, OutOfMemoryError, RayActorError, RayTaskError
from ray.tune import Trainable

from orchestrator.execution.local_cluster import RayDied, check_ray_health
from orchestrator.execution.messages import REPORT_KEY, AttemptReport, AttemptTask, DeviceFailed, WorkerLost
from orchestrator.execution.slots import Slots
from orchestrator.execution.workers.attempt_runner import AttemptRunner, Session, SessionFactory, SharingSession
from orchestrator.execution.workers.rank_actor import COMPANION_GROUP
from orchestrator.execution.workers.trial_worker import free_memory, with_retire_flag
from orchestrator.redaction import redact
from orchestrator.study.trial_records import FailureKind


@dataclass(slots=True, eq=False)
class _RunningAttempt:
    """An attempt with its training session, assigned at its first turn."""

    task: AttemptTask
    runner: AttemptRunner
    session: Session | None = None
    is_abandoned: bool = False
    """Whether its session may be in an undefined state, so that no other trial may use it."""


class SharedWorker:
    """Runs attempts in turns. Each has its own training session; the sessions share the loaded, frozen data."""

    def __init__(self, cache: Path, open_session: SessionFactory) -> None:
        self._cache, self._open_session = cache, open_session
        self._first_session: SharingSession | None = None
        self._free_sessions: list[Session] = []
        self._running: dict[str, _RunningAttempt] = {}
        self._closing = threading.Lock()
        """Held while an attempt is closed or abandoned, so that the session's next trial is not interrupted."""
        self._failed = ""
        """Message of a GPU failure, after which this process ends at the next call of `start` or `close`."""

    def start(self, task: AttemptTask) -> None:
        """Add an attempt; computation starts with `next_report`. An older attempt at the same trial is closed."""
        self._end_if_failed()
        for running in [running for running in self._running.values() if running.task.run_name == task.run_name]:
            self.close(running.task.id)
        self._running[task.id] = _RunningAttempt(task, AttemptRunner(task, lambda: self._session(task.id)))

    def next_report(self, task_id: str) -> AttemptReport:
        """Return the attempt's next report. Others wait, so that only one trial has activations in memory.

        Raises:
            WorkerLost: the process was restarted and has no such attempt.
            DeviceFailed: a GPU failed, so that the process must end.
        """
        if task_id not in self._running:
            raise WorkerLost("the process shared with other trials was restarted")
        if self._failed:
            raise DeviceFailed(self._failed)
        running = self._running[task_id]
        try:
            report = running.runner.next_report()
        except DeviceFailed as error:
            self._failed = f"a GPU failed in the process shared with other trials: {error}"
            raise DeviceFailed(self._failed) from None
        if report.result is not None and report.result.failure is FailureKind.OUT_OF_MEMORY:
            running.session, running.is_abandoned = None, True  # drops its partial state; the base model stays
            free_memory()
        return with_retire_flag(report)

    def close(self, task_id: str) -> None:
        """Close an attempt; its session can be used by another one."""
        self._end_if_failed()
        with self._closing:
            running = self._running.pop(task_id, None)
        if running is None:
            return
        running.runner.close()
        if running.session is not None and not running.is_abandoned:
            self._free_sessions.append(running.session)

    @ray.method(concurrency_group=COMPANION_GROUP)
    def interrupt_orphan(self, task_id: str) -> None:
        """Interrupt an attempt whose proxy died, so that its turn ends before `close` is processed."""
        with self._closing:
            running = self._running.get(task_id)
            if running is not None and running.session is not None:
                running.is_abandoned = True
                running.session.interrupt()

    def _end_if_failed(self) -> None:
        """End the process after a GPU failure; Ray restarts it, and its other trials get WorkerLost."""
        if self._failed:
            os._exit(1)

    def _session(self, task_id: str) -> Session:
        running = self._running[task_id]
        if running.session is None:
            if self._first_session is None:
                self._first_session = cast("SharingSession", self._open_session(self._cache))
            running.session = self._free_sessions.pop() if self._free_sessions else self._first_session.sibling()
        return running.session


_RESTART_SECONDS = 120.0
"""Seconds to wait for the restart of a dead process."""
_POLL_SECONDS = 0.2


class SharedWorkerPool:
    """The shared processes of all slots, started at their first trial and restarted by Ray."""

    def __init__(self, slots: Slots, cache: Path, open_session: SessionFactory) -> None:
        self._slots, self._arguments = slots, (cache, open_session)
        self._workers: list[Any] = []
        self._retired: list[Any] = []
        """Processes that get no more trials; each is ended after its last one."""
        self._worker_of: dict[str, Any] = {}

    @property
    def trainable(self) -> type[Trainable]:
        """The trainable class that Tune runs for each trial."""
        return ProxyTrainable

    def config(self, task: AttemptTask) -> dict[str, Any]:
        """Return the proxy's configuration, with the process that has the fewest trials.

        A process that replaces a retired one waits, with its trials, until that one has freed its GPU.
        """
        available = [worker for worker in self._workers if self._trials_of(worker) < self._slots.trials_per_process]
        if not available or len(self._workers) + len(self._retired) < self._slots.shared_processes:
            self._workers.append(self._start())
            available = self._workers[-1:]
        worker = min(available, key=self._trials_of)
        self._worker_of[task.id] = worker
        return {"task": task, "worker": worker}

    def actor_class(self, original: Any) -> Any:
        """Return the remote class as it is: proxies load nothing."""
        return original

    def on_attempt_end(self, task_id: str, *, lost: bool) -> None:
        """Close an attempt in its process; `lost`: its proxy died, so that its turn must be interrupted."""
        worker = self._worker_of.pop(task_id, None)
        if worker is None:
            return
        if lost:
            worker.interrupt_orphan.remote(task_id)
        worker.close.remote(task_id)
        if worker in self._retired and not self._trials_of(worker):
            self._retired.remove(worker)
            ray.kill(worker)

    def retire(self, task_id: str) -> bool:
        """Assign no more trials to the attempt's process; its other trials continue.

        Returns False, as Tune does not own this process.
        """
        worker = self._worker_of[task_id]
        if worker in self._workers:
            self._workers.remove(worker)
            self._retired.append(worker)
        return False

    def shut_down(self) -> None:
        """Kill all processes; nothing to do where Ray has died."""
        workers, self._workers, self._retired = [*self._workers, *self._retired], [], []
        try:
            check_ray_health()
        except RayDied:
            return
        for worker in workers:
            ray.kill(worker)

    def _trials_of(self, worker: Any) -> int:
        return list(self._worker_of.values()).count(worker)

    def _start(self) -> Any:
        remote: Any = ray.remote  # Ray's type hints lack concurrency groups
        resources = self._slots.process_resources
        return (
            remote(concurrency_groups={COMPANION_GROUP: 1})(SharedWorker)
            .options(
                num_cpus=resources.pop("CPU"),
                num_gpus=resources.pop("GPU", 0.0),
                resources=resources,
                max_restarts=-1,
                max_task_retries=0,
            )
            .remote(*self._arguments)
        )


class ProxyTrainable(Trainable):
    """Tune's worker of a trial that a shared process trains; it only forwards the reports."""

    def setup(self, config: dict[str, Any]) -> None:
        """Start the attempt in its shared process, waiting for a restart of that process."""
        self._task: AttemptTask = config["task"]
        self._worker: Any = config["worker"]
        deadline = time.monotonic() + _RESTART_SECONDS
        while True:
            try:
                _get_or_lost(self._worker.start.remote(self._task))
            except ActorUnavailableError as error:
                if time.monotonic() > deadline:
                    raise WorkerLost(_lost_message(error)) from None
                time.sleep(_POLL_SECONDS)
            else:
                return

    def step(self) -> dict[str, Any]:
        """Return the next report after the trial's turn."""
        try:
            return {REPORT_KEY: _get_or_lost(self._worker.next_report.remote(self._task.id))}
        except ActorUnavailableError as error:
            raise WorkerLost(_lost_message(error)) from None

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Start the next attempt, possibly in another process."""
        self.setup(new_config)
        return True


def _get_or_lost(reference: Any) -> Any:
    try:
        return ray.get(reference)
    except RayTaskError as error:
        raise error.cause from None
    except ActorUnavailableError:
        raise
    except (RayActorError, OutOfMemoryError) as died:
        raise WorkerLost(_lost_message(died)) from None


def _lost_message(error: Exception) -> str:
    reason = redact(" ".join(str(error).split()))
    return f"the process shared with other trials ended: {type(error).__name__}: {reason}"
