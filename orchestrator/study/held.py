"""A trial in the hands of a worker of this process."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from orchestrator.study.watch import Watch


@dataclass(frozen=True, slots=True)
class Held:
    """A trial this process has issued and not yet closed or released."""

    number: int
    attempt: int
    trial_id: int
    gpus: float
    watch: Watch
    since: float = field(default_factory=lambda: time.monotonic())

    @property
    def seconds(self) -> float:
        """How long a worker has had it."""
        return time.monotonic() - self.since
