"""The Tune trainable: one process with one training session kept loaded, one attempt after another."""

from __future__ import annotations

import gc
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray.tune import Trainable

from orchestrator.execution.messages import REPORT, AttemptReport, AttemptStatus, AttemptTask, DeviceFailed
from orchestrator.execution.workers.attempt_runner import AttemptRunner, Session, SessionFactory
from orchestrator.study.trial_records import FailureKind


class DedicatedWorkers:
    """A process for each trial: `Worker`."""

    def __init__(self, cache: Path, open_session: SessionFactory) -> None:
        self._cache, self._open_session = cache, open_session

    @property
    def trainable(self) -> type[Trainable]:
        """What Tune runs for each trial."""
        return Worker

    def config(self, task: AttemptTask) -> dict[str, Any]:
        """Everything a worker needs to begin."""
        return {"job": task, "cache": self._cache, "open": self._open_session}

    def on_attempt_end(self, task_id: str, *, lost: bool) -> None:
        """The worker knows."""

    def retire(self, task_id: str) -> bool:  # noqa: ARG002
        """The process is Tune's own worker."""
        return True

    def shut_down(self) -> None:
        """Tune ends its workers."""


class Worker(Trainable):
    """A class trainable: `step` pulls from the attempt, `reset_config` begins the next one with everything loaded."""

    def setup(self, config: dict[str, Any]) -> None:
        """Begin; nothing heavy yet, so that failures of loading belong to the trial."""
        self._cache: Path = config["cache"]
        self._open: SessionFactory = config["open"]
        self._loaded: Session | None = None
        self._failed = False
        self._start(config["job"])

    def step(self) -> dict[str, Any]:
        """The next report. DeviceFailed where this process must end: Tune has it clean up next, which ends it."""
        try:
            report = self._attempt.next_report()
        except DeviceFailed:
            self._failed = True
            raise
        if report.result is not None and report.result.failure is FailureKind.OUT_OF_MEMORY:
            self._loaded = None  # whatever the attempt left half made goes, the model too: the next one loads again
            free_memory()
        return {REPORT: retired(report)}

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """The next attempt, in the same process."""
        self._attempt.close()
        self._start(new_config["job"])
        return True

    def cleanup(self) -> None:
        """This worker is no longer needed."""
        if self._failed:
            os._exit(1)  # tidying up would ask CUDA again, and may wait for it for ever
        self._attempt.close()

    def _start(self, task: AttemptTask) -> None:
        self._attempt = AttemptRunner(task, self._session)

    def _session(self) -> Session:
        if self._loaded is None:
            self._loaded = self._open(self._cache)
        return self._loaded


def retired(report: AttemptReport) -> AttemptReport:
    """The report, and whether this process is to get no other trial after it.

    A trial that failed may have left the CUDA context, or the memory that it holds, in any state; a diverged one or
    one whose data were refused has not.
    """
    result = report.result
    torch: Any = sys.modules.get("torch")
    if result is None or result.status is not AttemptStatus.FAILED or result.failure is FailureKind.DATA:
        return report
    return replace(report, retire=torch is not None and torch.cuda.is_initialized())


def free_memory() -> None:
    """Give back the memory that nothing refers to any more."""
    gc.collect()
    torch: Any = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
