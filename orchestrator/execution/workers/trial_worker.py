"""What runs inside a worker process: one workshop, kept warm, and one attempt after another."""

from __future__ import annotations

import gc
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray.tune import Trainable

from orchestrator.execution.messages import REPORT, DeviceFailed, EndKind, Job, Report
from orchestrator.execution.workers.attempt_runner import Attempt, OpenWorkshop, Workshop
from orchestrator.study.trial_records import FailureKind


class OneEach:
    """A process for each trial: `Worker`."""

    def __init__(self, cache: Path, opened: OpenWorkshop) -> None:
        self._cache, self._open = cache, opened

    @property
    def trainable(self) -> type[Trainable]:
        """What Tune runs for each trial."""
        return Worker

    def config(self, job: Job) -> dict[str, Any]:
        """Everything a worker needs to begin."""
        return {"job": job, "cache": self._cache, "open": self._open}

    def left(self, job_id: str, *, lost: bool) -> None:
        """The worker knows."""

    def retire(self, job_id: str) -> bool:  # noqa: ARG002
        """The process is Tune's own worker."""
        return True

    def end(self) -> None:
        """Tune ends its workers."""


class Worker(Trainable):
    """A class trainable: `step` pulls from the attempt, `reset_config` begins the next one with everything loaded."""

    def setup(self, config: dict[str, Any]) -> None:
        """Begin; nothing heavy yet, so that failures of loading belong to the trial."""
        self._cache: Path = config["cache"]
        self._open: OpenWorkshop = config["open"]
        self._loaded: Workshop | None = None
        self._failed = False
        self._begin(config["job"])

    def step(self) -> dict[str, Any]:
        """The next report. DeviceFailed where this process must end: Tune has it clean up next, which ends it."""
        try:
            report = self._attempt.pull()
        except DeviceFailed:
            self._failed = True
            raise
        if report.end is not None and report.end.failure is FailureKind.OUT_OF_MEMORY:
            self._loaded = None  # whatever the attempt left half made goes, the model too: the next one loads again
            empty()
        return {REPORT: retired(report)}

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """The next attempt, in the same process."""
        self._attempt.close()
        self._begin(new_config["job"])
        return True

    def cleanup(self) -> None:
        """This worker is no longer needed."""
        if self._failed:
            os._exit(1)  # tidying up would ask CUDA again, and may wait for it for ever
        self._attempt.close()

    def _begin(self, job: Job) -> None:
        self._attempt = Attempt(job, self._workshop)

    def _workshop(self) -> Workshop:
        if self._loaded is None:
            self._loaded = self._open(self._cache)
        return self._loaded


def retired(report: Report) -> Report:
    """The report, and whether this process is to get no other trial after it.

    A trial that failed may have left the CUDA context, or the memory that it holds, in any state; a diverged one or
    one whose data were refused has not.
    """
    end = report.end
    torch: Any = sys.modules.get("torch")
    if end is None or end.kind is not EndKind.FAILED or end.failure is FailureKind.DATA:
        return report
    return replace(report, retire=torch is not None and torch.cuda.is_initialized())


def empty() -> None:
    """Give back the memory that nothing refers to any more."""
    gc.collect()
    torch: Any = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
