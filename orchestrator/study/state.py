"""The states of a trial and the reasons for each."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class TrialState(StrEnum):
    """Finished states (COMPLETE, PRUNED, FAILED) are final. PAUSED: begun, and put aside by hand until unpaused."""

    QUEUED = "QUEUED"
    RUNNING = "RUNNING"
    PAUSED = "PAUSED"
    COMPLETE = "COMPLETE"
    PRUNED = "PRUNED"
    FAILED = "FAILED"

    @property
    def finished(self) -> bool:
        """Whether nothing can change any more."""
        return self in (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAILED)


class FailureKind(StrEnum):
    """Why a trial failed. A dead worker is none of these: its trial is issued again."""

    OUT_OF_MEMORY = "OUT_OF_MEMORY"
    PREEMPTED = "PREEMPTED"
    DATA = "DATA"
    BUG = "BUG"


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a trial ended, for `Study.close`. `reason` is in words and required for everything but COMPLETE."""

    state: TrialState
    reason: str = ""
    failure: FailureKind | None = None
    diverged: bool = False

    def __post_init__(self) -> None:
        if not self.state.finished:
            raise ValueError(f"an outcome is final; {self.state} is not")
        if self.state is not TrialState.COMPLETE and not self.reason:
            raise ValueError(f"{self.state} needs a reason")
        if (self.state is TrialState.FAILED) != (self.failure is not None):
            raise ValueError("a failure kind goes with FAILED and with nothing else")
