"""What runs inside a worker process: one workshop, kept warm, and one attempt after another."""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from typing import Any

from ray.tune import Trainable

from orchestrator.engine.attempt import Attempt, OpenWorkshop, Workshop
from orchestrator.engine.bridge import REPORT
from orchestrator.engine.messages import Job
from orchestrator.study.state import FailureKind


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

    def end(self) -> None:
        """Tune ends its workers."""


class Worker(Trainable):
    """A class trainable: `step` pulls from the attempt, `reset_config` begins the next one with everything loaded."""

    def setup(self, config: dict[str, Any]) -> None:
        """Begin; nothing heavy yet, so that failures of loading belong to the trial."""
        self._cache: Path = config["cache"]
        self._open: OpenWorkshop = config["open"]
        self._loaded: Workshop | None = None
        self._begin(config["job"])

    def step(self) -> dict[str, Any]:
        """The next report."""
        report = self._attempt.pull()
        if report.end is not None and report.end.failure is FailureKind.OUT_OF_MEMORY:
            self._loaded = None  # whatever the attempt left half made goes, the model too: the next one loads again
            empty()
        return {REPORT: report}

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """The next attempt, in the same process."""
        self._attempt.close()
        self._begin(new_config["job"])
        return True

    def cleanup(self) -> None:
        """This worker is no longer needed."""
        self._attempt.close()

    def _begin(self, job: Job) -> None:
        self._attempt = Attempt(job, self._workshop)

    def _workshop(self) -> Workshop:
        if self._loaded is None:
            self._loaded = self._open(self._cache)
        return self._loaded


def empty() -> None:
    """Give back the memory that nothing refers to any more."""
    gc.collect()
    torch: Any = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
