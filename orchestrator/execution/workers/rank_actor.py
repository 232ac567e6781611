"""`RankActor`: one process of a multi-process trial, a Ray actor that takes every step together with the others."""

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
from orchestrator.execution.workers.attempt_runner import RELEASE_POLL_SECONDS, Session, SessionFactory
from orchestrator.gpu_locks import use_own_gpus
from trainer.config.trial import TrialConfig
from trainer.results import RunResult, StepMetrics

COMPANION_GROUP = "companion"
"""Ray concurrency group of methods that run during a step."""


@dataclass(frozen=True, slots=True)
class RankStep:
    """Metrics of a step, or the end of the run: by itself (`result`) or by an exception (`failed`)."""

    metrics: StepMetrics | None = None
    result: RunResult | None = None
    failed: AttemptResult | None = None
    counters: Mapping[str, int] = field(default_factory=dict[str, int])
    warnings: Sequence[str] = ()
    """What the trainer warned of meanwhile."""


class RankActor:
    """Process `number` of `size`. Process 0 writes the files and its metrics are reported."""

    def __init__(self, number: int, size: int, cache: Path, open_session: SessionFactory) -> None:
        self._number, self._size, self._cache, self._open_session = number, size, cache, open_session
        self._socket: socket.socket | None = None
        self._session: Session | None = None
        self._metrics: Generator[StepMetrics, None, RunResult] | None = None
        self._folder = Path()
        self._run = 0
        self._run_lock = threading.Lock()
        """Held while the run changes, so that an interrupt reaches only the run that it was meant for."""
        threading.Thread(target=_exit_with_raylet, args=(os.getppid(),), daemon=True).start()

    def gpus(self) -> list[str]:
        """Return the ids of the GPUs that Ray assigned to this process."""
        found: list[Any] = ray.get_gpu_ids()
        return [str(gpu) for gpu in found]

    def open_rendezvous(self) -> int:
        """Open the rendezvous socket of process 0; return its port."""
        from trainer.distributed.processes import open_rendezvous

        self._socket = open_rendezvous()
        port: int = self._socket.getsockname()[1]
        return port

    def join_rendezvous(self, port: int, gpus: Sequence[str]) -> int:
        """Join the process group, open the training session and return the process id.

        `port`: port of process 0; `gpus`: GPU ids of all processes.
        """
        from trainer.distributed.processes import join_rendezvous

        if gpus:
            use_own_gpus()
        join_rendezvous(self._number, self._size, port, self._socket, gpus)
        self._session = self._open_session(self._cache)
        return os.getpid()

    def begin(
        self, run: int, config: str, folder: Path, earlier_attempts: Sequence[Path], fork_folder: Path | None
    ) -> None:
        """Prepare the next training as run number `run`; computation starts with `next`."""
        assert self._session is not None
        # Other processes write their tracebacks into separate folders.
        self._folder = folder if self._number == 0 else folder / f"process-{self._number}"
        with self._run_lock:
            self._run = run
            self._metrics = self._session.train(
                TrialConfig.model_validate_json(config), folder, earlier_attempts, fork_folder
            )

    def next(self) -> RankStep:
        """Take the next step."""
        assert self._metrics is not None
        assert self._session is not None
        step_metrics, result, failed = None, None, None
        warnings: list[str] = []
        try:
            with captured_warnings() as warnings:
                step_metrics = next(self._metrics)
        except StopIteration as done:
            result = done.value
        except Exception as error:  # noqa: BLE001 - exceptions of a trial are recorded as its result
            failed = result_of_exception(error, self._folder)
        if step_metrics is None:
            self._metrics = None
        return RankStep(step_metrics, result, failed, dict(self._session.counters), tuple(warnings))

    def close(self) -> None:
        """Stop the run, as in all other processes."""
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None

    @ray.method(concurrency_group=COMPANION_GROUP)
    def interrupt(self, run: int, checkpoint: bool = True) -> None:
        """Request this run to save a checkpoint, if `checkpoint`, and end, at a step on which all processes agree; no
        effect later.
        """
        with self._run_lock:
            if run == self._run and self._metrics is not None and self._session is not None:
                self._session.interrupt(checkpoint=checkpoint)


def _exit_with_raylet(raylet: int) -> None:
    wait = threading.Event()
    while not wait.wait(RELEASE_POLL_SECONDS):
        if os.getppid() != raylet:
            os._exit(1)
