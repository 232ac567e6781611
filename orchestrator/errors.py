"""Errors that a user can cause, each a class with fields, a message and an exit code; the study's refusals included."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from enum import IntEnum
from pathlib import Path

from trainer.results import clause


class ExitCode(IntEnum):
    """Exit codes of the command."""

    DONE = 0
    INTERNAL_ERROR = 1
    USER = 2
    NO_TRIAL_COMPLETED = 3
    LOCKED = 4
    REFUSED = 5
    TRIALS_FAILED = 6
    INTERRUPTED = 130


def closest_match(word: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Return the known word that is most similar to `word`, for a hint `did you mean`; None below `cutoff` (0 to 1)."""
    found = get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return found[0] if found else None


def first_line(error: object) -> str:
    """Return the first line of an error's text that is not empty."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")


class OrchestrateError(Exception):
    """Base class: an error with a message for the user and an exit code, printed without a traceback."""

    code: ExitCode = ExitCode.USER


@dataclass(frozen=True, slots=True)
class SpecProblem:
    """One error in a sweep file or an override: its location, the problem and a hint how to fix it."""

    where: str
    """`file:line`, or the command-line flag that holds the value; "" until it is known."""
    path: str
    """Dotted path of the setting; empty for the file as a whole."""
    problem: str
    hint: str = ""

    def __str__(self) -> str:
        location = "".join(f"{part}: " for part in (self.where, self.path) if part)
        return f"{location}{self.problem}{f' ({self.hint})' if self.hint else ''}"


class SpecError(OrchestrateError):
    """The sweep file or its overrides are invalid. Holds all problems, not only the first."""

    def __init__(self, problems: Sequence[SpecProblem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(str(f) for f in self.problems))


class DataError(OrchestrateError):
    """The data has rows that cannot be trained on; the message counts and lists them."""


class InvalidSweepName(OrchestrateError):
    """The name cannot be a sweep's name, which is also the name of its folder."""

    def __init__(self, name: str) -> None:
        self.name = name
        super().__init__(
            f"{name!r} cannot be a sweep's name, which is also the name of its folder: use 1 to 64 letters, digits, "
            "dots, dashes and underscores, the first a letter or a digit, and no symbolic link"
        )


class ReservedName(OrchestrateError):
    """The runs folder itself has a file or a folder of this name."""

    def __init__(self, name: str) -> None:
        super().__init__(f"a sweep cannot be named {name!r}: the runs folder uses that name itself; use another --name")


class NameTaken(OrchestrateError):
    """A sweep of this name exists already. Nothing was overwritten."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        super().__init__(
            f"a sweep named {name!r} exists in {folder}; continue it with `orchestrate resume {name}`, "
            "or start another with `--name OTHER`"
        )


_MOST_NAMES = 20
"""Of sweeps, in a message."""


class NoSuchSweep(OrchestrateError):
    """The runs folder has no sweep of this name."""

    def __init__(self, name: str, root: Path, known: Sequence[str], nearest: str | None) -> None:
        self.name, self.root, self.known, self.nearest = name, root, tuple(known), nearest
        more = f" and {len(known) - _MOST_NAMES} more" if len(known) > _MOST_NAMES else ""
        listed = f"its sweeps: {', '.join(known[:_MOST_NAMES])}{more}" if known else "it has no sweeps yet"
        where = f"{root} ({listed})" if root.is_dir() else f"{root}, which does not exist; $ORCHESTRATE_HOME sets it"
        super().__init__(f"no sweep named {name!r} in {where}{f'; did you mean {nearest!r}?' if nearest else ''}")


class SweepIsArchived(NoSuchSweep):
    """The sweep was archived from this runs folder, and is not here."""

    def __init__(self, name: str, root: Path) -> None:
        self.name, self.root, self.known, self.nearest = name, root, (), None
        message = (
            f"{name} is archived; `orchestrate unarchive {name}` brings it back, `orchestrate list` says from where"
        )
        OrchestrateError.__init__(self, message)


class Declined(OrchestrateError):
    """The person answered no."""

    def __init__(self) -> None:
        super().__init__("nothing was changed")


class InvalidRunsFolder(OrchestrateError):
    """The runs folder has a name that cannot be used."""

    def __init__(self, root: str, reason: str) -> None:
        super().__init__(
            f"the runs folder {root} cannot be used: {clause(reason)}; set ORCHESTRATE_HOME to another folder"
        )


class NoTrialCompleted(OrchestrateError):
    """The sweep ended without a single complete trial."""

    code = ExitCode.NO_TRIAL_COMPLETED


class SweepIncomplete(OrchestrateError):
    """The sweep ended, and not with every trial trained: it was stopped, or trials failed. `code` says which."""

    def __init__(self, name: str, code: ExitCode, reason: str) -> None:
        self.name, self.code, self.reason = name, code, reason
        what = "some of its trials failed" if code is ExitCode.TRIALS_FAILED else "it can be resumed"
        super().__init__(f"{name} ended before its end or with failures ({clause(reason)}): {what}")


JUDGING = ", judging"
"""End of the text of a sweep's holder that trains nothing and reads no requests."""


class SweepHeld(OrchestrateError):
    """Another driver holds this sweep's lock or lease."""

    code = ExitCode.LOCKED

    def __init__(self, name: str, holder: str, *, stopped: bool = False) -> None:
        """`stopped`: the holder's process is suspended by a signal such as Ctrl-Z and answers no request."""
        self.name, self.holder = name, holder
        how = f"`orchestrate attach {name}` shows its table, `orchestrate stop {name}` stops it"
        if stopped:
            how = "it was stopped by a signal (Ctrl-Z?): continue it (`fg`, or `kill -CONT`), or end that process"
        elif holder.endswith(JUDGING):
            how = f"`orchestrate logs {name} -f` shows how far"
        work = "judged" if holder.endswith(JUDGING) else "driven"
        super().__init__(f"sweep {name!r} is being {work} by {holder.removesuffix(JUDGING)}; {how}")


class StorageRefused(OrchestrateError):
    """The disk, the study's database or the tracking server refused a read or a write."""

    code = ExitCode.REFUSED


class StudyMissing(OrchestrateError):
    """The database holds no study of this sweep."""

    code = ExitCode.REFUSED

    def __init__(self, where: str) -> None:
        super().__init__(f"there is no study in {where}")


class NetworkDisk(OrchestrateError):
    """A SQLite file is on a network file system, where SQLite's locks do not exclude other machines."""

    code = ExitCode.REFUSED

    def __init__(self, path: Path, kind: str, other: str = "the study in PostgreSQL") -> None:
        """other: what to keep instead."""
        super().__init__(
            f"{path} is on a network file system ({kind}), where SQLite loses data; put the runs folder on a local "
            f"disk ($ORCHESTRATE_HOME) or keep {other}"
        )


class PasswordInUrl(OrchestrateError):
    """A database URL contains a password, which would be written to files and logs."""

    def __init__(self, url: str) -> None:
        super().__init__(f"{url} contains a password; leave it out and give it by $PGPASSWORD or ~/.pgpass")


class SpecChanged(OrchestrateError):
    """The requested change would make trials of one sweep incomparable."""

    def __init__(self, name: str, paths: Sequence[str], changes: Sequence[str], may: Sequence[str]) -> None:
        self.paths = list(paths)
        listed = "\n".join(f"  {change}" for change in changes)
        super().__init__(
            "a sweep that has begun cannot change what its trials have in common, else they could not be compared:\n"
            f"{listed}\n"
            f"Nothing was changed. What may change: {', '.join(may)}; lists and ranges of search may grow. For "
            "anything else begin another sweep (`orchestrate sweep FILE --name OTHER --set ...`), or try single values "
            f"in this one (`orchestrate enqueue {name} --set ...`)."
        )


class SearchNarrowed(OrchestrateError):
    """The changed search of a begun sweep leaves out what may have been tried, or searches in another way."""

    def __init__(self, name: str, problems: Sequence[str]) -> None:
        listed = "\n".join(f"  {problem}" for problem in problems)
        super().__init__(
            "the search of a sweep that has begun can only grow: more values in a list, a lower or higher end of a "
            "range:\n"
            f"{listed}\n"
            f"Nothing was changed. For another search begin another sweep (`orchestrate suggest {name}`, or "
            "`orchestrate sweep FILE --name OTHER --set ...`)."
        )


class TooManySlots(OrchestrateError):
    """The concurrency is above what the sweep's visibility rule (order.lag) allows."""

    def __init__(self, slots: int, lag: int) -> None:
        self.slots, self.lag = slots, lag
        super().__init__(
            f"in this sweep trial n sees the results of trials up to n - {lag} (order.lag, fixed when it began), so "
            f"at most {lag} trials can run at a time, not {slots}; set budget.concurrency={lag}, or begin "
            "another sweep with a larger order.lag or with order: asap"
        )
