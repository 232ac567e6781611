"""`StageWorker`: runs the SFT stage in a worker process, since the driver never imports torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from orchestrator.errors import DataError, ExitCode, OrchestrateError, StorageRefused
from orchestrator.execution.local_cluster import check_ray_health
from orchestrator.execution.messages import (
    RELEASE_REQUEST_FILE,
    WORKER_FILE,
    AttemptReport,
    AttemptResult,
    AttemptStatus,
    AttemptTask,
    WorkerLost,
)
from orchestrator.execution.sft_cache_key import stage_key
from orchestrator.execution.slots import Slots
from orchestrator.execution.stop_reasons import SignalHandler, StageInterrupted
from orchestrator.execution.workers.attempt_runner import AttemptRunner, Session, SessionFactory
from orchestrator.execution.workers.session_factory import session_factory
from orchestrator.redaction import redact
from trainer.config.trial import TrialConfig
from trainer.results import TrialError

_POLL_SECONDS = 0.2


class StageFailed(OrchestrateError):
    """A stage before the trials failed; the sweep can be resumed after the cause is fixed."""

    code = ExitCode.INTERNAL_ERROR


class StageDied(StageFailed):
    """The worker process of the stage died."""


class StageActor:
    """The Ray actor of the stage."""

    def __init__(self, cache: Path, open_session: SessionFactory) -> None:
        self._cache, self._open_session = cache, open_session
        self._loaded: Session | None = None
        self._runner: AttemptRunner | None = None

    def key(self, config: str, fingerprint: str) -> str:
        """Return the cache key of the stage's model."""
        return stage_key(TrialConfig.model_validate_json(config), fingerprint, self._cache)

    def start(self, task: AttemptTask) -> None:
        """Prepare the training of this task."""
        self._runner = AttemptRunner(task, self._session, lock_timeout=float("inf"))

    def next_report(self) -> AttemptReport:
        """Return the next report of the training."""
        assert self._runner is not None
        return self._runner.next_report()

    def _session(self) -> Session:
        if self._loaded is None:
            self._loaded = self._open_session(self._cache)
        return self._loaded


class StageWorker:
    """The driver's handle of the stage's worker process, which exists from `start` to `shut_down`."""

    def __init__(
        self,
        slots: Slots,
        cache: Path,
        signals: SignalHandler,
        on_poll: Callable[[], None],
        open_session: SessionFactory,
    ) -> None:
        self._signals, self._on_poll, self._slots = signals, on_poll, slots
        self._arguments = (cache, session_factory(open_session, slots))
        self._group: Any = None
        self._actor: Any = None

    def __enter__(self) -> StageWorker:
        return self

    def __exit__(self, *_: object) -> None:
        self.shut_down()

    def start(self) -> None:
        """Start the worker process; returns at once, while it loads."""
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        bundle = self._slots.stage_resources
        options: dict[str, Any] = {"num_cpus": bundle.pop("CPU"), "num_gpus": bundle.pop("GPU", 0.0)}
        if self._slots.processes > 1:
            self._group = ray.util.placement_group(self._slots.bundles, strategy=self._slots.strategy)
            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(self._group, 0)
        self._actor = ray.remote(StageActor).options(resources=bundle, **options).remote(*self._arguments)

    def shut_down(self) -> None:
        """Kill the worker and free its resources; repeated calls have no effect."""
        import ray

        if self._actor is not None:
            ray.kill(self._actor)
            self._actor = None
        if self._group is not None:
            ray.util.remove_placement_group(self._group)
            self._group = None

    def restart(self) -> None:
        """Replace the worker by a new process."""
        self.shut_down()
        self.start()

    def key(self, config: TrialConfig, fingerprint: str) -> str:
        """Return the cache key of the stage's model."""
        return self._wait_for(self._actor.key.remote(config.model_dump_json(), fingerprint))

    def train(
        self, task: AttemptTask, on_report: Callable[[AttemptReport], None], should_stop: Callable[[], bool]
    ) -> AttemptResult:
        """Train to the end and pass each report to `on_report`.

        Raises:
            StageInterrupted: after a stop signal or `should_stop`, when the worker has saved a checkpoint.
            StageDied: the worker died; call `restart`.
        """
        for name in (RELEASE_REQUEST_FILE, WORKER_FILE):  # left by an earlier process in the same folder
            (task.folder / name).unlink(missing_ok=True)
        self._wait_for(self._actor.start.remote(task))
        while True:
            report: AttemptReport = self._wait_for(self._actor.next_report.remote(), task)
            if should_stop() and report.result is None:
                task.request_release()
            on_report(report)
            if report.result is not None:
                if report.result.status is AttemptStatus.RELEASED:
                    raise StageInterrupted
                return report.result

    def _wait_for(self, reference: Any, task: AttemptTask | None = None) -> Any:
        """Wait for a result; a stop signal requests a checkpoint of `task`, without task it raises Interrupted."""
        import ray
        from ray.exceptions import OutOfMemoryError, RayActorError, RayTaskError

        while not ray.wait([reference], timeout=_POLL_SECONDS)[0]:
            self._on_poll()
            check_ray_health()
            if self._signals.received:
                if task is None:
                    raise StageInterrupted
                task.request_release()
        try:
            return ray.get(reference)
        except RayTaskError as error:
            raise _user_message(error.cause) from error
        except (RayActorError, OutOfMemoryError) as error:
            check_ray_health()
            raise StageDied(f"the worker of this stage died: {redact(str(error))}") from error


def _user_message(cause: BaseException) -> BaseException:
    """Convert an exception of the worker to one with a message for the user."""
    if isinstance(cause, WorkerLost):
        return StageDied(f"the worker of this stage died: {cause}")
    if isinstance(cause, TrialError):
        return DataError(str(cause))
    if isinstance(cause, OSError) and cause.errno is not None:
        return StorageRefused(str(cause))
    return cause
