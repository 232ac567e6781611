"""A trial in the hands of a worker of this process."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from orchestrator.study.watch import Watch
from trainer.report import Point


@dataclass(frozen=True, slots=True)
class Told:
    """What the study has of a trial: its steps, the last of them and the last value of every metric."""

    steps: set[int] = field(default_factory=set[int])
    step: int = 0
    last: Mapping[str, float] = field(default_factory=dict[str, float])

    def after(self, points: Sequence[Point]) -> Told:
        """With these, in order, on top. The set of steps is the same one: nobody keeps the older one."""
        last = dict(self.last)
        for point in points:
            last |= point.metrics
        self.steps.update(point.step for point in points)
        return Told(self.steps, max(self.step, *(point.step for point in points)), last)


@dataclass(slots=True)
class Held:
    """A trial this process has issued and not yet closed or released."""

    number: int
    attempt: int
    trial_id: int
    gpus: float
    watch: Watch
    told: Told | None = None
    """What was committed of it; None: to be read, as after a transaction that failed."""
    since: float | None = None
    """By the monotonic clock, when a worker took it; None while it waits for one."""

    def begin(self) -> None:
        """A worker has it now. Called again, it changes nothing."""
        if self.since is None:
            self.since = time.monotonic()

    @property
    def seconds(self) -> float:
        """How long a worker has had it."""
        return 0.0 if self.since is None else time.monotonic() - self.since
