"""`SharedWorker`: one process, a Ray actor, in which several trials take turns over one frozen model.

`SharedWorkers` is the driver's side: which trial runs in which process. `ProxyTrainable` is Ray Tune's worker for such
a trial.
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
from orchestrator.execution.messages import REPORT, AttemptReport, AttemptTask, DeviceFailed, WorkerLost
from orchestrator.execution.slots import Slots
from orchestrator.execution.workers.attempt_runner import AttemptRunner, Session, SessionFactory, SharingSession
from orchestrator.execution.workers.rank_actor import COMPANION_RESOURCE
from orchestrator.execution.workers.trial_worker import free_memory, retired
from orchestrator.redaction import redact
from orchestrator.study.trial_records import FailureKind


@dataclass(slots=True, eq=False)
class _RunningAttempt:
    """An attempt, and the training session it has from its first turn on."""

    task: AttemptTask
    runner: AttemptRunner
    session: Session | None = None
    is_abandoned: bool = False
    """Its training session may be half interrupted; no other trial gets it."""


class SharedWorker:
    """Attempts by the id of their task. Each has its own training session; the sessions share loaded, frozen data."""

    def __init__(self, cache: Path, open_session: SessionFactory) -> None:
        self._cache, self._open_session = cache, open_session
        self._first_session: SharingSession | None = None
        self._free_sessions: list[Session] = []
        self._running: dict[str, _RunningAttempt] = {}
        self._leaving = threading.Lock()
        """Held while a seat is left or given up: whoever has its training session next is not interrupted for it."""
        self._failed = ""
        """How a GPU failed under this process, which ends with the first trial that lets go of it."""

    def start(self, task: AttemptTask) -> None:
        """Take this attempt in; nothing is computed yet. An older one at the same trial ends: nobody listens to it."""
        self._end_if_failed()
        for running in [running for running in self._running.values() if running.task.run == task.run]:
            self.close(running.task.id)
        self._running[task.id] = _RunningAttempt(task, AttemptRunner(task, lambda: self._session(task.id)))

    def next_report(self, task_id: str) -> AttemptReport:
        """The attempt's turn: its next points. Neighbours wait, so that activations of one trial live at a time."""
        if task_id not in self._running:
            raise WorkerLost("the process that it shares with other trials was started anew")
        if self._failed:
            raise DeviceFailed(self._failed)
        running = self._running[task_id]
        try:
            report = running.runner.next_report()
        except DeviceFailed as error:
            self._failed = f"a GPU failed under the process that it shares with other trials: {error}"
            raise DeviceFailed(self._failed) from None
        if report.result is not None and report.result.failure is FailureKind.OUT_OF_MEMORY:
            running.session, running.is_abandoned = None, True  # with whatever was left half made; the base stays
            free_memory()
        return retired(report)

    def close(self, task_id: str) -> None:
        """This attempt is over, whatever became of it; its training session is free for another."""
        self._end_if_failed()
        with self._leaving:
            running = self._running.pop(task_id, None)
        if running is None:
            return
        running.runner.close()
        if running.session is not None and not running.is_abandoned:
            self._free_sessions.append(running.session)

    @ray.method(concurrency_group=COMPANION_RESOURCE)
    def abandon(self, task_id: str) -> None:
        """Whoever pulled this attempt is gone: have its turn end soon, before `close` comes to it."""
        with self._leaving:
            running = self._running.get(task_id)
            if running is not None and running.session is not None:
                running.is_abandoned = True
                running.session.interrupt()

    def _end_if_failed(self) -> None:
        """Ray starts the process anew; what its other trials ask of it next tells them that they lost it."""
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
"""For a process that died to be there again."""
_POLL_SECONDS = 0.2


class SharedWorkers:
    """As many processes as the slots need, each started at its first trial and again by Ray where it dies."""

    def __init__(self, slots: Slots, cache: Path, open_session: SessionFactory) -> None:
        self._slots, self._arguments = slots, (cache, open_session)
        self._workers: list[Any] = []
        self._retired: list[Any] = []
        """Processes that get no more trials; each is ended once its last one has left it."""
        self._worker_of: dict[str, Any] = {}

    @property
    def trainable(self) -> type[Trainable]:
        """What Tune runs for each trial."""
        return ProxyTrainable

    def config(self, task: AttemptTask) -> dict[str, Any]:
        """The trial's, with the process that has the fewest trials.

        A process in place of a retired one waits, and its trials with it, until that one has given back its GPU.
        """
        available = [worker for worker in self._workers if self._trials_of(worker) < self._slots.trials_per_process]
        if not available or len(self._workers) + len(self._retired) < self._slots.shared_processes:
            self._workers.append(self._start())
            available = self._workers[-1:]
        worker = min(available, key=self._trials_of)
        self._worker_of[task.id] = worker
        return {"job": task, "host": worker}

    def on_attempt_end(self, task_id: str, *, lost: bool) -> None:
        """This attempt is over; `lost`: its relay is gone, and the process may not know it."""
        worker = self._worker_of.pop(task_id, None)
        if worker is None:
            return
        if lost:
            worker.abandon.remote(task_id)
        worker.close.remote(task_id)
        if worker in self._retired and not self._trials_of(worker):
            self._retired.remove(worker)
            ray.kill(worker)

    def retire(self, task_id: str) -> bool:
        """The process of this attempt gets no more trials; those in it go on to their ends. It is not Tune's own."""
        worker = self._worker_of[task_id]
        if worker in self._workers:
            self._workers.remove(worker)
            self._retired.append(worker)
        return False

    def shut_down(self) -> None:
        """End every process at once; where Ray has died, they have died with it."""
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
        remote: Any = ray.remote  # its types know of no groups
        more = self._slots.process_resources
        return (
            remote(concurrency_groups={COMPANION_RESOURCE: 1})(SharedWorker)
            .options(
                num_cpus=more.pop("CPU"),
                num_gpus=more.pop("GPU", 0.0),
                resources=more,
                max_restarts=-1,
                max_task_retries=0,
            )
            .remote(*self._arguments)
        )


class ProxyTrainable(Trainable):
    """Tune's worker of a trial that another process trains: it passes the reports on and computes nothing."""

    def setup(self, config: dict[str, Any]) -> None:
        """Have the attempt taken in."""
        self._task: AttemptTask = config["job"]
        self._worker: Any = config["host"]
        until = time.monotonic() + _RESTART_SECONDS
        while True:
            try:
                _get(self._worker.start.remote(self._task))
            except ActorUnavailableError as away:
                if time.monotonic() > until:
                    raise WorkerLost(_worker_lost(away)) from None
                time.sleep(_POLL_SECONDS)
            else:
                return

    def step(self) -> dict[str, Any]:
        """The next report, once it was the trial's turn."""
        try:
            return {REPORT: _get(self._worker.next_report.remote(self._task.id))}
        except ActorUnavailableError as away:
            raise WorkerLost(_worker_lost(away)) from None

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """The next attempt, maybe in another process."""
        self.setup(new_config)
        return True


def _get(reference: Any) -> Any:
    try:
        return ray.get(reference)
    except RayTaskError as error:
        raise error.cause from None
    except ActorUnavailableError:
        raise
    except (RayActorError, OutOfMemoryError) as died:
        raise WorkerLost(_worker_lost(died)) from None


def _worker_lost(error: Exception) -> str:
    reason = redact(" ".join(str(error).split()))
    return f"the process that it shares with other trials ended: {type(error).__name__}: {reason}"
