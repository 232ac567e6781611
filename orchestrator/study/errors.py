"""What the study refuses: each says which trial, what was asked and why not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from orchestrator.errors import ExitCode, OrchestrateError
from orchestrator.study.state import TrialState


class StudyMissing(OrchestrateError):
    """There is no study where one was expected."""

    code = ExitCode.REFUSED

    def __init__(self, where: str) -> None:
        super().__init__(f"there is no study in {where}")


class NetworkDisk(OrchestrateError):
    """SQLite's locks do not hold on network file systems: two machines could write over each other."""

    code = ExitCode.REFUSED

    def __init__(self, path: Path, kind: str) -> None:
        super().__init__(
            f"{path} lies on a network file system ({kind}), where SQLite loses data; put the runs folder on a local "
            "disk ($ORCHESTRATE_HOME) or keep the study in PostgreSQL"
        )


class PasswordInUrl(OrchestrateError):
    """A password in a URL ends up in files, logs and other people's screens."""

    def __init__(self, url: str) -> None:
        super().__init__(f"{url} carries a password; leave it out and give it by $PGPASSWORD or ~/.pgpass")


class SpecChanged(OrchestrateError):
    """The change asked for would mix trials of two different sweeps."""

    def __init__(self, name: str, leaves: Sequence[str], changes: Sequence[str], may: Sequence[str]) -> None:
        self.leaves = list(leaves)
        listed = "\n".join(f"  {change}" for change in changes)
        super().__init__(
            f"a sweep that has begun keeps what its trials have in common, else they could not be compared:\n{listed}\n"
            f"Nothing was changed. What may change: {', '.join(may)}. For the rest begin another sweep (`orchestrate "
            f"sweep FILE --name OTHER --set ...`), or try single values in this one (`orchestrate enqueue {name} "
            "--set ...`)."
        )


class TooManySlots(OrchestrateError):
    """More trials at a time than the sweep's order of knowing allows."""

    def __init__(self, slots: int, lag: int) -> None:
        self.slots, self.lag = slots, lag
        super().__init__(
            f"in this sweep trial n knows the results of trials up to n - {lag} (order.lag, fixed when it began), so "
            f"at most {lag} trials can run at a time, and {slots} would; set budget.concurrency={lag}, or begin "
            "another sweep with a larger order.lag or with order: asap"
        )


class StudyMisuse(Exception):
    """A call that the order of things forbids: a mistake of ours, never of the user."""


class TrialFinished(StudyMisuse):
    """A finished trial takes no more points and no other outcome."""

    def __init__(self, number: int, state: TrialState, asked: str) -> None:
        self.number, self.state = number, state
        super().__init__(f"trial {number} is {state}, which is final: {asked} refused")


class NotHeld(StudyMisuse):
    """Only the attempt that was issued last may write."""

    def __init__(self, number: int, attempt: int, held: int | None) -> None:
        self.number, self.attempt, self.held = number, attempt, held
        what = "is not issued" if held is None else f"is in attempt {held}"
        super().__init__(f"attempt {attempt} of trial {number} may not write: the trial {what}")
