"""`DedicatedWorker`: Tune trainable, a process with one loaded training session that runs one attempt after another."""

from __future__ import annotations

import gc
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray.tune import Trainable

from orchestrator.execution.messages import REPORT_KEY, AttemptReport, AttemptStatus, AttemptTask, DeviceFailed
from orchestrator.execution.workers.attempt_runner import AttemptRunner, Session, SessionFactory
from orchestrator.study.trial_records import FailureKind


class DedicatedWorkerPool:
    """Workers with a separate process for each trial."""

    def __init__(self, cache: Path, open_session: SessionFactory) -> None:
        self._cache, self._open_session = cache, open_session

    @property
    def trainable(self) -> type[Trainable]:
        """The trainable class that Tune runs for each trial."""
        return DedicatedWorker

    def config(self, task: AttemptTask) -> dict[str, Any]:
        """Return the configuration of a worker for this attempt."""
        return {"task": task, "cache": self._cache, "open_session": self._open_session}

    def on_attempt_end(self, task_id: str, *, lost: bool) -> None:
        """Do nothing: the worker closes its attempt itself."""

    def retire(self, task_id: str) -> bool:  # noqa: ARG002
        """Return True: the process is Tune's own worker, which Tune ends."""
        return True

    def shut_down(self) -> None:
        """Do nothing: Tune ends its workers."""


class DedicatedWorker(Trainable):
    """Tune trainable: `step` returns the attempt's next report, `reset_config` starts the next attempt."""

    def setup(self, config: dict[str, Any]) -> None:
        """Prepare the first attempt; loading is deferred to `step`, so that its failures belong to the trial."""
        self._cache: Path = config["cache"]
        self._open: SessionFactory = config["open_session"]
        self._loaded: Session | None = None
        self._failed = False
        self._start(config["task"])

    def step(self) -> dict[str, Any]:
        """Return the next report.

        Raises:
            DeviceFailed: a GPU failed; Tune calls `cleanup` next, which ends the process.
        """
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
        self._attempt.close()
        self._start(new_config["task"])
        return True

    def cleanup(self) -> None:
        """Close the attempt before Tune ends this worker."""
        if self._failed:
            os._exit(1)  # a regular exit would call CUDA, which may hang
        self._attempt.close()

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
