"""Training before the first trial, in a worker of its own: the driver never imports torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from orchestrator.errors import DataError, ExitCode, OrchestrateError, StorageRefused
from orchestrator.execution.local_cluster import Slots, check_ray
from orchestrator.execution.messages import STOP_FILE, WORKER_FILE, End, EndKind, Job, Report, WorkerLost
from orchestrator.execution.sft_cache_key import stage_key
from orchestrator.execution.stop_reasons import Interrupt, Interrupted
from orchestrator.execution.workers.attempt_runner import Attempt, OpenWorkshop, Workshop
from orchestrator.execution.workers.session_factory import for_slots
from orchestrator.redaction import redact
from trainer.config.trial import TrialConfig
from trainer.results import TrialError

_POLL_SECONDS = 0.2


class StageFailed(OrchestrateError):
    """A stage before the trials did not end well; the sweep can be resumed once the cause is gone."""

    code = ExitCode.OURS


class StageDied(StageFailed):
    """Its worker process ended."""


class StageProcess:
    """The worker's side."""

    def __init__(self, cache: Path, open_workshop: OpenWorkshop) -> None:
        self._cache, self._open = cache, open_workshop
        self._loaded: Workshop | None = None
        self._attempt: Attempt | None = None

    def key(self, config: str, fingerprint: str) -> str:
        """Name of what training this configuration makes."""
        return stage_key(TrialConfig.model_validate_json(config), fingerprint, self._cache)

    def begin(self, job: Job) -> None:
        """Train this one next."""
        self._attempt = Attempt(job, self._workshop, patience=float("inf"))

    def pull(self) -> Report:
        """The next points of the training."""
        assert self._attempt is not None
        return self._attempt.pull()

    def _workshop(self) -> Workshop:
        if self._loaded is None:
            self._loaded = self._open(self._cache)
        return self._loaded


class StageWorker:
    """The driver's handle on one stage process, inside a `cluster`; there is none before `start`."""

    def __init__(
        self,
        slots: Slots,
        cache: Path,
        interrupt: Interrupt,
        tick: Callable[[], None],
        open_workshop: OpenWorkshop,
    ) -> None:
        self._interrupt, self._tick, self._slots = interrupt, tick, slots
        self._given = (cache, for_slots(open_workshop, slots))
        self._group: Any = None
        self._actor: Any = None

    def __enter__(self) -> StageWorker:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def start(self) -> None:
        """Take a slot and load, while others work."""
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        bundle = self._slots.of_stage
        options: dict[str, Any] = {"num_cpus": bundle.pop("CPU"), "num_gpus": bundle.pop("GPU", 0.0)}
        if self._slots.processes > 1:
            self._group = ray.util.placement_group(self._slots.bundles, strategy=self._slots.strategy)
            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(self._group, 0)
        self._actor = ray.remote(StageProcess).options(resources=bundle, **options).remote(*self._given)

    def end(self) -> None:
        """Give the slot back; called twice, it is done once."""
        import ray

        if self._actor is not None:
            ray.kill(self._actor)
            self._actor = None
        if self._group is not None:
            ray.util.remove_placement_group(self._group)
            self._group = None

    def restart(self) -> None:
        """Another process in its place, with nothing loaded."""
        self.end()
        self.start()

    def key(self, config: TrialConfig, fingerprint: str) -> str:
        """Name of what training this configuration makes."""
        return self._ask(self._actor.key.remote(config.model_dump_json(), fingerprint))

    def train(self, job: Job, heard: Callable[[Report], None], stopped: Callable[[], bool]) -> End:
        """Train to the end, telling each report; Interrupted once the process has checkpointed, StageDied where it
        ended otherwise: then `restart`."""
        for left in (STOP_FILE, WORKER_FILE):  # of an earlier process in the same folder
            (job.folder / left).unlink(missing_ok=True)
        self._ask(self._actor.begin.remote(job))
        while True:
            report: Report = self._ask(self._actor.pull.remote(), job)
            if stopped() and report.end is None:
                job.ask_to_stop()
            heard(report)
            if report.end is not None:
                if report.end.kind is EndKind.RELEASED:
                    raise Interrupted
                return report.end

    def _ask(self, reference: Any, job: Job | None = None) -> Any:
        """Wait for an answer; with a job, an interruption lets it checkpoint, otherwise it ends the wait."""
        import ray
        from ray.exceptions import OutOfMemoryError, RayActorError, RayTaskError

        while not ray.wait([reference], timeout=_POLL_SECONDS)[0]:
            self._tick()
            check_ray()
            if self._interrupt.asked:
                if job is None:
                    raise Interrupted
                job.ask_to_stop()
        try:
            return ray.get(reference)
        except RayTaskError as error:
            raise _ours(error.cause) from error
        except (RayActorError, OutOfMemoryError) as error:
            check_ray()
            raise StageDied(f"the worker of this stage died: {redact(str(error))}") from error


def _ours(cause: BaseException) -> BaseException:
    """What the user reads instead of Ray's wrapping."""
    if isinstance(cause, WorkerLost):
        return StageDied(f"the worker of this stage died: {cause}")
    if isinstance(cause, TrialError):
        return DataError(str(cause))
    if isinstance(cause, OSError) and cause.errno is not None:
        return StorageRefused(str(cause))
    return cause
