"""`DedicatedWorker`: Tune trainable, a process with one loaded training session that runs one attempt after another.

`PrestartedWorkers` starts such processes before there is a trial, so that they import while the data are prepared.
"""

from __future__ import annotations

import gc
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from orchestrator.execution.local_cluster import RayDied, check_ray_health
from orchestrator.execution.messages import REPORT_KEY, AttemptReport, AttemptStatus, AttemptTask, DeviceFailed
from orchestrator.execution.slots import Slots, workers_before_trials
from orchestrator.execution.workers.attempt_runner import AttemptRunner, Session, SessionFactory
from orchestrator.study.trial_records import FailureKind
from trainer.environment import collecting_rarely

with collecting_rarely():
    import ray
    from ray.actor import ActorClass
    from ray.exceptions import RayError
    from ray.tune import Trainable


class PrestartedWorkers:
    """Worker processes of trials to come, which open their sessions while the sweep prepares its data."""

    def __init__(self, slots: Slots, cache: Path, open_session: SessionFactory) -> None:
        self._slots, self._config = slots, {"cache": cache, "open_session": open_session}
        self._workers: list[tuple[Any, Any]] = []
        """Each process with the reference that is ready when it has opened its session."""

    def __enter__(self) -> PrestartedWorkers:
        return self

    def __exit__(self, *_: object) -> None:
        self.shut_down()

    def start(self, count: int) -> int:
        """Start up to `count` processes, as `workers_before_trials` allows; return their number.

        Returns at once, while they load.
        """
        if not ray.is_initialized():
            return 0
        start: Any = ray.remote(DedicatedWorker)
        for _ in range(min(count, workers_before_trials(self._slots))):
            worker = start.options(num_cpus=0).remote(dict(self._config))
            self._workers.append((worker, worker.__ray_ready__.remote()))
        return len(self._workers)

    def take(self) -> Any:
        """Return a process that no trial has, None where there is none.

        A process that could not open its session is passed over: what starts with its trial fails with its trial.
        """
        while self._workers:
            worker, opened = self._workers.pop(0)
            if ray.wait([opened], timeout=0)[0]:
                try:
                    ray.get(opened)
                except RayError:
                    continue
            return worker
        return None

    def shut_down(self) -> None:
        """Kill the processes that no trial took; nothing to do where Ray has died."""
        workers, self._workers = self._workers, []
        try:
            check_ray_health()
        except RayDied:
            return
        for worker, _ in workers:
            ray.kill(worker)


class PrestartedActorClass(ActorClass):  # pyright: ignore[reportMissingTypeArgument]
    """The remote class that Tune gets: its actors are prestarted processes, as long as there are some."""

    def __init__(self, original: Any, prestarted: PrestartedWorkers) -> None:
        self._original, self._prestarted = original, prestarted

    def options(self, **options: Any) -> PrestartedActorClass:
        """Return the class with these options, which do not change a process that runs."""
        return PrestartedActorClass(self._original.options(**options), self._prestarted)

    def remote(self, config: dict[str, Any], storage: Any) -> Any:
        """Return an actor with this configuration."""
        worker = self._prestarted.take()
        if worker is None:
            return self._original.remote(config=config, storage=storage)
        worker.reset.remote(config, storage=storage)
        return worker


class DedicatedWorkerPool:
    """Workers with a separate process for each trial."""

    def __init__(self, cache: Path, open_session: SessionFactory, prestarted: PrestartedWorkers | None = None) -> None:
        self._cache, self._open_session, self._prestarted = cache, open_session, prestarted

    @property
    def trainable(self) -> type[Trainable]:
        """The trainable class that Tune runs for each trial."""
        return DedicatedWorker

    def config(self, task: AttemptTask) -> dict[str, Any]:
        """Return the configuration of a worker for this attempt."""
        return {"task": task, "cache": self._cache, "open_session": self._open_session}

    def actor_class(self, original: Any) -> Any:
        """Return the remote class that gives the prestarted processes first."""
        return original if self._prestarted is None else PrestartedActorClass(original, self._prestarted)

    def on_attempt_end(self, task_id: str, *, lost: bool) -> None:
        """Do nothing: the worker closes its attempt itself."""

    def retire(self, task_id: str) -> bool:  # noqa: ARG002
        """Return True: the process is Tune's own worker, which Tune ends."""
        return True

    def shut_down(self) -> None:
        """Do nothing: Tune ends its workers."""


class DedicatedWorker(Trainable):
    """Tune trainable: `step` returns the attempt's next report, `reset_config` starts the next attempt."""

    _attempt: AttemptRunner | None = None
    """The attempt; None in a prestarted process before its first one."""

    def setup(self, config: dict[str, Any]) -> None:
        """Prepare the first attempt; loading is deferred to `step`, so that its failures belong to the trial.

        Without a task the process is prestarted, and opens its session now.
        """
        self._cache: Path = config["cache"]
        self._open: SessionFactory = config["open_session"]
        self._loaded: Session | None = None
        self._failed = False
        if "task" in config:
            self._start(config["task"])
        else:
            self._session()

    def step(self) -> dict[str, Any]:
        """Return the next report.

        Raises:
            DeviceFailed: a GPU failed; Tune calls `cleanup` next, which ends the process.
        """
        assert self._attempt is not None
        try:
            report = self._attempt.next_report()
        except DeviceFailed:
            self._failed = True
            raise
        if report.result is not None and report.result.failure is FailureKind.OUT_OF_MEMORY:
            self._loaded = None  # drops partial state and model; the next attempt loads again
            free_memory()
        return {REPORT_KEY: with_retire_flag(report)}

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Start the next attempt in the same process."""
        if self._attempt is not None:
            self._attempt.close()
        self._start(new_config["task"])
        return True

    def cleanup(self) -> None:
        """Close the attempt before Tune ends this worker."""
        if self._failed:
            os._exit(1)  # a regular exit would call CUDA, which may hang
        if self._attempt is not None:
            self._attempt.close()

    def _setup_logdir(self) -> None:
        """Make the trial's folder of Tune; without a trial Tune would make one in the home folder."""
        if self._storage is not None:
            super()._setup_logdir()

    def _start(self, task: AttemptTask) -> None:
        self._attempt = AttemptRunner(task, self._session)

    def _session(self) -> Session:
        if self._loaded is None:
            self._loaded = self._open(self._cache)
        return self._loaded


def with_retire_flag(report: AttemptReport) -> AttemptReport:
    """Return the report with `retire` set if this process must get no other trial.

    A failed trial may leave CUDA context and GPU memory in any state; a diverged one, or refused data, does not.
    """
    result = report.result
    torch: Any = sys.modules.get("torch")
    if result is None or result.status is not AttemptStatus.FAILED or result.failure is FailureKind.DATA:
        return report
    return replace(report, retire=torch is not None and torch.cuda.is_initialized())


def free_memory() -> None:
    """Free unreferenced memory, also in torch's CUDA cache."""
    gc.collect()
    torch: Any = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
