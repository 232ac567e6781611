"""Every error a user can cause, the study's refusals among them: a class with fields, one sentence, one exit code."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from enum import IntEnum
from pathlib import Path


class ExitCode(IntEnum):
    """What the command tells the shell."""

    DONE = 0
    INTERNAL_ERROR = 1
    USER = 2
    NO_TRIAL_COMPLETED = 3
    LOCKED = 4
    REFUSED = 5
    INTERRUPTED = 130


def closest_match(word: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known word most like this one, for `did you mean`."""
    found = get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return found[0] if found else None


def first_line(error: object) -> str:
    """The first line of an error's text that is not empty."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")


class OrchestrateError(Exception):
    """An error with a sentence for the user and an exit code; printed without a traceback."""

    code: ExitCode = ExitCode.USER


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing wrong in a file: where, what, and what would be right."""

    where: str
    """`file:line`, or the command-line flag it came from."""
    path: str
    """Dotted path of the setting; empty for the file as a whole."""
    problem: str
    hint: str = ""

    def __str__(self) -> str:
        location = f"{self.where}: {self.path}: " if self.path else f"{self.where}: "
        return f"{location}{self.problem}{f' ({self.hint})' if self.hint else ''}"


class SpecError(OrchestrateError):
    """The sweep file or its overrides: all findings at once."""

    def __init__(self, findings: Sequence[Finding]) -> None:
        self.findings = tuple(findings)
        super().__init__("\n".join(str(f) for f in self.findings))


class DataError(OrchestrateError):
    """Rows that cannot be trained on, counted and listed."""


class InvalidSweepName(OrchestrateError):
    """A name that cannot be a sweep's: it becomes a folder."""

    def __init__(self, name: str) -> None:
        self.name = name
        super().__init__(
            f"{name!r} cannot be a sweep's name: it is its folder's, so it has 1 to 64 letters, digits, dots, dashes "
            "and underscores, begins with a letter or a digit, and is no link"
        )


class NameTaken(OrchestrateError):
    """A sweep of this name exists; nothing was overwritten."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        super().__init__(
            f"a sweep named {name!r} exists in {folder}; continue it with `orchestrate resume {name}`, "
            "or start another with `--name OTHER`"
        )


class NoSuchSweep(OrchestrateError):
    """No sweep of this name under the runs folder."""

    def __init__(self, name: str, known: Sequence[str], nearest: str | None) -> None:
        self.name, self.known, self.nearest = name, tuple(known), nearest
        listed = ", ".join(known) if known else "none yet"
        super().__init__(
            f"no sweep named {name!r}{f'; did you mean {nearest!r}?' if nearest else ''} (sweeps here: {listed})"
        )


class NoTrialCompleted(OrchestrateError):
    """The sweep ended without a single complete trial."""

    code = ExitCode.NO_TRIAL_COMPLETED


class SweepHeld(OrchestrateError):
    """Another driver holds this sweep."""

    code = ExitCode.LOCKED

    def __init__(self, name: str, holder: str, *, stopped: bool = False) -> None:
        """`stopped`: the holder's process was stopped by a signal, as by Ctrl-Z, and answers no request."""
        self.name, self.holder = name, holder
        how = f"stop it there first (`orchestrate stop {name}`)"
        if stopped:
            how = "it was stopped by a signal (Ctrl-Z?): have it go on (`fg`, or `kill -CONT`), or end that process"
        super().__init__(f"sweep {name!r} is being driven by {holder}; {how}")


class StorageRefused(OrchestrateError):
    """The disk, the study's database or the tracking server refused."""

    code = ExitCode.REFUSED


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

    def __init__(self, name: str, paths: Sequence[str], changes: Sequence[str], may: Sequence[str]) -> None:
        self.paths = list(paths)
        listed = "\n".join(f"  {change}" for change in changes)
        super().__init__(
            f"a sweep that has begun keeps what its trials have in common, else they could not be compared:\n{listed}\n"
            f"Nothing was changed. What may change: {', '.join(may)}. For the rest begin another sweep (`orchestrate "
            f"sweep FILE --name OTHER --set ...`), or try single values in this one (`orchestrate enqueue {name} "
            "--set ...`)."
        )


class TooManySlots(OrchestrateError):
    """More trials at a time than the sweep's visibility rule allows."""

    def __init__(self, slots: int, lag: int) -> None:
        self.slots, self.lag = slots, lag
        super().__init__(
            f"in this sweep trial n knows the results of trials up to n - {lag} (order.lag, fixed when it began), so "
            f"at most {lag} trials can run at a time, and {slots} would; set budget.concurrency={lag}, or begin "
            "another sweep with a larger order.lag or with order: asap"
        )
