"""`RankActor`: one process of a multi-process trial, a Ray actor that takes a step when all others do."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray

from orchestrator.execution.messages import AttemptResult, result_of_exception
from orchestrator.execution.trainer_warnings import captured_warnings
from orchestrator.execution.workers.attempt_runner import STOP_POLL_SECONDS, Session, SessionFactory
from trainer.config.trial import TrialConfig
from trainer.results import RunResult, StepMetrics

COMPANION_RESOURCE = "beside"
"""The group of calls that are taken while a step is made."""


@dataclass(frozen=True, slots=True)
class RankStep:
    """A point, or how it ended: by itself, or by an exception. `counters` says what this process has loaded so far."""

    metrics: StepMetrics | None = None
    result: RunResult | None = None
    failed: AttemptResult | None = None
    counters: Mapping[str, int] = field(default_factory=dict[str, int])
    warnings: Sequence[str] = ()
    """What the trainer warned of meanwhile."""


class RankActor:
    """Number `number` of `size`. The first one writes the files and is heard; the others keep in step with it."""

    def __init__(self, number: int, size: int, cache: Path, open_session: SessionFactory) -> None:
        self._number, self._size, self._cache, self._open_session = number, size, cache, open_session
        self._socket: socket.socket | None = None
        self._session: Session | None = None
        self._metrics: Generator[StepMetrics, None, RunResult] | None = None
        self._folder = Path()
        self._run = 0
        self._between = threading.Lock()
        """Held while one run gives way to the next, so that an interrupt is of the one that it was meant for."""
        threading.Thread(target=_exit_with_raylet, args=(os.getppid(),), daemon=True).start()

    def gpus(self) -> list[str]:
        """What Ray gave to this process."""
        found: list[Any] = ray.get_gpu_ids()
        return [str(gpu) for gpu in found]

    def open_rendezvous(self) -> int:
        """Of the first one: where the others find it."""
        from trainer.distributed.processes import open_rendezvous

        self._socket = open_rendezvous()
        port: int = self._socket.getsockname()[1]
        return port

    def join_rendezvous(self, port: int, gpus: Sequence[str]) -> int:
        """Meet the others, then open the training session; the process id."""
        from trainer.distributed.processes import join_rendezvous

        join_rendezvous(self._number, self._size, port, self._socket, gpus)
        self._session = self._open_session(self._cache)
        return os.getpid()

    def begin(self, run: int, config: str, folder: Path, earlier: Sequence[Path], fork: Path | None) -> None:
        """Train this next, as run number `run`; nothing is computed yet."""
        assert self._session is not None
        # A failure of another process than the first is told beside that one's, never over it.
        self._folder = folder if self._number == 0 else folder / f"process-{self._number}"
        with self._between:
            self._run = run
            self._metrics = self._session.train(TrialConfig.model_validate_json(config), folder, earlier, fork)

    def next(self) -> RankStep:
        """The next point, or the end."""
        assert self._metrics is not None
        assert self._session is not None
        step_metrics, result, failed = None, None, None
        warnings: list[str] = []
        try:
            with captured_warnings() as warnings:
                step_metrics = next(self._metrics)
        except StopIteration as done:
            result = done.value
        except Exception as error:  # noqa: BLE001  the trial boundary: an exception becomes recorded data
            failed = result_of_exception(error, self._folder)
        if step_metrics is None:
            self._metrics = None
        return RankStep(step_metrics, result, failed, dict(self._session.counters), tuple(warnings))

    def close(self) -> None:
        """Stop here, as all the others do."""
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None

    @ray.method(concurrency_group=COMPANION_RESOURCE)
    def interrupt(self, run: int) -> None:
        """Have this run save a checkpoint and end; the processes agree among themselves when. Late, it does nothing."""
        with self._between:
            if run == self._run and self._metrics is not None and self._session is not None:
                self._session.interrupt()


def _exit_with_raylet(raylet: int) -> None:
    wait = threading.Event()
    while not wait.wait(STOP_POLL_SECONDS):
        if os.getppid() != raylet:
            os._exit(1)
