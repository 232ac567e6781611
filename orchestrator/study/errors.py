"""What the study refuses: each says which trial, what was asked and why not."""

from __future__ import annotations

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

    def __init__(self, leaves: list[str]) -> None:
        self.leaves = leaves
        super().__init__(
            f"a sweep that has begun keeps its {', '.join(leaves)}: its trials would no longer be comparable; "
            "start another sweep for that"
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
