"""`MultiProcessSession`: the processes of a trial on several GPUs as one training session of its worker.

The processes run in the trial's placement group and take every step together; closing a run closes it in all of them.
The death of one process ends the attempt: the others are killed and the trial is retried.
"""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator.execution.messages import AttemptResult, AttemptStatus, RemoteFailure, WorkerLost
from orchestrator.execution.trainer_warnings import TRAINER_LOGGER
from orchestrator.execution.workers.attempt_runner import SessionFactory
from orchestrator.folders import FAILURE_FILE
from orchestrator.redaction import redact
from trainer.config.trial import TrialConfig
from trainer.results import RunResult, StepMetrics

_POLL_SECONDS = 1.0
_CAUSE_SECONDS = 5.0
"""Seconds to wait for the other processes after a failure in one, as another one may have the cause."""
_SECONDARY_ERRORS = ("gloo", "NCCL", "DistBackendError", "Connection closed by peer", "Connection reset by peer")
"""Parts of error messages of a process that lost its peer."""


class MultiProcessSession:
    """A training session of several processes, started at the first trial and kept for the next ones."""

    def __init__(
        self, cache: Path, open_session: SessionFactory, size: int, process_resources: Mapping[str, float]
    ) -> None:
        """`size`: number of processes; `process_resources`: Ray resources of each."""
        self._cache, self._open_session, self._size, self._process_resources = (
            cache,
            open_session,
            size,
            dict(process_resources),
        )
        self._actors: list[Any] = []
        self._counters: Mapping[str, int] = {}
        self._run = 0
        self._interrupt_requested = threading.Event()
        """Set when the newest run is interrupted; each run has its own event and number."""
        self._wants_checkpoint = True

    @property
    def counters(self) -> Mapping[str, int]:
        """Load counters of the first process."""
        return self._counters

    def interrupt(self, *, checkpoint: bool = True) -> None:
        """Request the newest run to save a checkpoint, if `checkpoint`, and end as STOPPED.

        Thread-safe, no effect after its end.
        """
        self._wants_checkpoint = checkpoint
        self._interrupt_requested.set()
        for actor in self._actors[:1]:  # reaches it during a long step
            actor.interrupt.remote(self._run, checkpoint)

    def train(
        self, config: TrialConfig, folder: Path, earlier_attempts: Sequence[Path] = (), fork_folder: Path | None = None
    ) -> Generator[StepMetrics, None, RunResult]:
        """Train one configuration in all processes and yield its metrics.

        Raises:
            WorkerLost: a process ended or its GPU failed.
            RemoteFailure: a process failed otherwise.
        """
        self._run += 1
        self._interrupt_requested = threading.Event()
        return self._train(self._run, self._interrupt_requested, config, folder, earlier_attempts, fork_folder)

    def _train(
        self,
        run: int,
        interrupt_requested: threading.Event,
        config: TrialConfig,
        folder: Path,
        earlier_attempts: Sequence[Path],
        fork_folder: Path | None,
    ) -> Generator[StepMetrics, None, RunResult]:
        try:
            if not self._actors:
                self._start()
            self._call_all("begin", run, config.model_dump_json(), folder, list(earlier_attempts), fork_folder)
            while True:
                if interrupt_requested.is_set():  # possibly requested before the processes existed
                    self._actors[0].interrupt.remote(run, self._wants_checkpoint)
                replies = self._call_all("next")
                first = replies.get(0)
                for message in () if first is None else first.warnings:
                    TRAINER_LOGGER.warning("%s", message)  # captured with what this process itself warns of
                failed = {number: reply.failed for number, reply in replies.items() if reply.failed is not None}
                if failed or first is None:
                    raise self._failure(failed, folder)
                self._counters = first.counters
                if first.result is not None:
                    return first.result
                assert first.metrics is not None
                yield first.metrics
        except GeneratorExit:
            with contextlib.suppress(WorkerLost):  # the trial has ended in any case
                self._call_all("close")
            raise
        except BaseException:
            self.shut_down()
            raise

    def shut_down(self) -> None:
        """End every process at once."""
        import ray

        actors, self._actors = self._actors, []
        for actor in actors:
            ray.kill(actor)

    def _start(self) -> None:
        import ray
        from ray.util import get_current_placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        from orchestrator.execution.workers.rank_actor import COMPANION_GROUP, RankActor

        group = get_current_placement_group()
        assert group is not None, "the trial's worker is in a placement group"
        remote: Any = ray.remote  # Ray's type hints lack concurrency groups
        actor = remote(concurrency_groups={COMPANION_GROUP: 1})(RankActor)
        for number in range(self._size):
            strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=number + 1)
            resources = dict(self._process_resources)
            options = {"num_cpus": resources.pop("CPU"), "num_gpus": resources.pop("GPU", 0.0), "resources": resources}
            handle = actor.options(scheduling_strategy=strategy, **options).remote(
                number, self._size, self._cache, self._open_session
            )
            self._actors.append(handle)
        gpu_ids = self._call_all("gpus")
        gpus = [gpu for number in range(self._size) for gpu in gpu_ids[number]]
        port: int = ray.get(self._actors[0].open_rendezvous.remote())
        self._call_all("join_rendezvous", port, gpus)

    def _call_all(self, method: str, *arguments: Any) -> dict[int, Any]:
        """Call a method of all processes; return the replies by process number, after a failure only prompt ones."""
        import ray
        from ray.exceptions import OutOfMemoryError, RayActorError

        waiting = {getattr(actor, method).remote(*arguments): number for number, actor in enumerate(self._actors)}
        replies: dict[int, Any] = {}
        until = float("inf")
        while waiting and time.monotonic() < until:
            for done in ray.wait(list(waiting), timeout=_POLL_SECONDS)[0]:
                number = waiting.pop(done)
                try:
                    replies[number] = ray.get(done)
                except (RayActorError, OutOfMemoryError) as died:
                    self.shut_down()
                    raise WorkerLost(f"process {number + 1} of {self._size} ended: {_line(died)}") from None
                if getattr(replies[number], "failed", None) is not None:
                    until = min(until, time.monotonic() + _CAUSE_SECONDS)
        return replies

    def _failure(self, failed: Mapping[int, AttemptResult], folder: Path) -> Exception:
        number = _root_cause(failed, folder)
        if failed[number].status is AttemptStatus.LOST:
            return WorkerLost(f"process {number + 1} of {self._size} is unusable: {failed[number].reason}")
        return RemoteFailure(failed[number])


def _root_cause(failed: Mapping[int, AttemptResult], folder: Path) -> int:
    """Return the process whose failure caused the others'; its traceback becomes the attempt's."""
    own = [n for n, result in failed.items() if not any(words in result.reason for words in _SECONDARY_ERRORS)]
    lost = [n for n in own if failed[n].status is AttemptStatus.LOST]
    number = min(lost or own or failed)
    traceback_file = folder / f"process-{number}" / FAILURE_FILE
    if traceback_file.is_file():
        shutil.copyfile(traceback_file, folder / FAILURE_FILE)
    return number


def _line(error: Exception) -> str:
    return redact(" ".join(str(error).split()))
