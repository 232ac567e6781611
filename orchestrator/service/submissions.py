"""`Submissions`: sweep files that people send, loaded and planned in a process with limits on time and memory.

What the file of a person without the role admin may name is decided by `file_rights`; what it makes expensive (a
template that loops, a file of a hundred gigabytes) ends with the process, and the service continues.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import queue
import resource
import signal
import threading
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from fastapi import HTTPException

from orchestrator import errors
from orchestrator.commands.runs_folder.queue_records import SERVICE_FOLDER, UPLOADS_FOLDER
from orchestrator.errors import ExitCode, OrchestrateError, SpecError, SpecProblem
from orchestrator.service import LARGEST_MODEL_GB
from orchestrator.service.access_tokens import Person, Role
from orchestrator.service.uploaded_files import UploadedFiles
from orchestrator.spec.loading.file_rights import FileRights, check_settings
from orchestrator.spec.loading.overrides import parse_overrides
from trainer.results import TrialError

_SECONDS = 60.0
_BYTES = 8 << 30
_PROCESSES = 2
_TURN_SECONDS = 10.0
"""For which a person's request waits for the one before."""
_FREE_SECONDS = 60.0
"""For which a request waits for a process that others use."""
_BY_ADMIN = "an administrator of the service may submit such a sweep"
FORBIDDEN: Mapping[str, str] = {
    "storage": f"the service would open this database; {_BY_ADMIN}",
    "mirror": f"the service would write to this URL; {_BY_ADMIN}",
    "tracking.uri": f"the service would write to this server; {_BY_ADMIN}",
    "tracking.artifacts": f"the service would write to this URL; {_BY_ADMIN}",
    "notify": f"the service would run this command, or send to the URL in its environment; {_BY_ADMIN}",
    "judge.endpoint": f"the service would send its key and requests to this address; {_BY_ADMIN}",
}
"""Settings of a sweep file that only administrators may submit, each with the reason."""


@dataclass(frozen=True, slots=True)
class LoadedSweep:
    """A submitted sweep without errors."""

    name: str
    spec: str
    """The resolved sweep file."""
    gpus: int
    """The fewest GPUs that one trial needs."""
    notices: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ChangedSweep:
    """A sweep whose settings were changed. `spec`: its resolved file, of one that has no folder yet; else ""."""

    spec: str
    gpus: int
    notices: tuple[str, ...]


class SubmissionRefused(OrchestrateError):
    """A submitted file cannot be loaded or planned for a reason that is no mistake at a line."""

    def __init__(self, message: str, code: int = ExitCode.USER) -> None:
        super().__init__(message)
        self.code = ExitCode(code)


class Submissions:
    """Sweep files of one runs folder's service."""

    def __init__(
        self,
        root: Path,
        data_folders: Sequence[Path] = (),
        *,
        seconds: float = _SECONDS,
        most_bytes: int = _BYTES,
        processes: int = _PROCESSES,
        largest_model: float = LARGEST_MODEL_GB,
    ) -> None:
        """Start no process yet.

        Args:
            root: the runs folder.
            data_folders: folders whose files a submitted sweep may read.
            seconds: for which loading or planning one file may take.
            most_bytes: memory of a process.
            processes: files that are loaded at a time.
            largest_model: in GB, of a model that a person sends; 0: none.
        """
        self._root, self._folders = root, tuple(folder.resolve() for folder in data_folders)
        self.uploads = UploadedFiles(root / SERVICE_FOLDER / UPLOADS_FOLDER, largest_model=largest_model)
        self._free: queue.LifoQueue[_Loader] = queue.LifoQueue()
        self._loaders = [_Loader(seconds, most_bytes) for _ in range(processes)]
        for loader in self._loaders:
            self._free.put(loader)
        self._guard = threading.Lock()
        self._turns: dict[str, threading.Lock] = {}

    def close(self) -> None:
        """End the processes."""
        for loader in self._loaders:
            loader.close()

    def rights(self, person: Person, files: Mapping[str, str] | None = None) -> FileRights:
        """Return what a file of this person may name: of an administrator, every file, but no environment variable.

        `files`: names in the file that stand for uploaded files, as for `UploadedFiles.aliases`. Raises SpecError.
        """
        aliases = self.uploads.aliases(person.name, files or {})
        own = self.uploads.folder_of(person.name).resolve()
        if person.role >= Role.ADMIN:
            return FileRights((self._root, *self._folders), None, aliases=aliases)
        opened = (
            f"the service opens {', '.join(map(str, self._folders))}" if self._folders else "the service opens none"
        )
        advice = (
            f"{opened}; an administrator adds one by `orchestrate serve --data-folder FOLDER`, and a file of your own "
            "machine is sent by `orchestrate --server URL sweep FILE --upload`"
        )
        folders = (*self._folders, own) if own.is_dir() else self._folders
        return FileRights(folders, None, is_closed=True, advice=advice, forbidden=FORBIDDEN, aliases=aliases)

    def load(
        self,
        person: Person,
        text: str,
        overrides: Sequence[str],
        name: str | None,
        files: Mapping[str, str] | None = None,
    ) -> LoadedSweep:
        """Load a sweep file. Raises SpecError with all mistakes and their lines, SubmissionRefused."""
        found = self._call(person, ("load", self._root, self.rights(person, files), text, tuple(overrides), name))
        return LoadedSweep(**found)

    def plan(
        self,
        person: Person,
        text: str,
        overrides: Sequence[str],
        name: str | None,
        files: Mapping[str, str] | None = None,
    ) -> dict[str, Any]:
        """Return the plan of a sweep file as `orchestrate plan --json` does. Raises as `load`."""
        return self._call(person, ("plan", self._root, self.rights(person, files), text, tuple(overrides), name))

    def change(self, person: Person, name: str, overrides: Sequence[str], waiting: str = "") -> ChangedSweep:
        """Change a sweep that no driver runs, for its next driver, as `orchestrate resume --set`; else nothing.

        Args:
            person: who changes it; the changes may name what a submitted file of this person may.
            name: the sweep.
            overrides: changes as PATH=VALUE.
            waiting: the resolved file of a sweep that has no folder yet; it is returned changed.

        Raises:
            OrchestrateError: as `load`, and as `change_settings`, with its class where that tells what to do.
        """
        found = self._call(person, ("change", self._root, self.rights(person), waiting, tuple(overrides), name))
        return ChangedSweep(**found)

    def check_overrides(self, person: Person, overrides: Sequence[str]) -> None:
        """Check what the settings of one trial name, as `enqueue` and `clone` take them. Raises SpecError."""
        rights = self.rights(person)
        problems = [
            SpecProblem(f"--set {one}", "", "a submitted setting reads no environment variables", "write the value")
            for one in overrides
            if "${" in one.replace("$${", "")
        ]
        if problems:
            raise SpecError(problems)
        if rights.is_closed:
            check_settings(rights, dict(parse_overrides(overrides)))

    def _call(self, person: Person, task: tuple[Any, ...]) -> dict[str, Any]:
        with self._turn(person.name), self._free_loader() as loader:
            return loader.call(task)

    @contextmanager
    def _turn(self, name: str) -> Generator[None]:
        """Let each person use one process at a time."""
        with self._guard:
            turn = self._turns.setdefault(name, threading.Lock())
        if not turn.acquire(timeout=_TURN_SECONDS):
            raise HTTPException(
                HTTPStatus.TOO_MANY_REQUESTS,
                "your sweep file before this one is still being read",
                {"retry-after": "5"},
            )
        try:
            yield
        finally:
            turn.release()

    @contextmanager
    def _free_loader(self) -> Generator[_Loader]:
        try:
            loader = self._free.get(timeout=_FREE_SECONDS)
        except queue.Empty:
            raise HTTPException(
                HTTPStatus.SERVICE_UNAVAILABLE, "the sweep files of others are still being read", {"retry-after": "30"}
            ) from None
        try:
            yield loader
        finally:
            self._free.put(loader)


class _Loader:
    """One process that loads files, started at the first and again after one that exceeded a limit."""

    def __init__(self, seconds: float, most_bytes: int) -> None:
        self._seconds, self._bytes = seconds, most_bytes
        self._process: BaseProcess | None = None
        self._pipe: Connection | None = None

    def call(self, task: tuple[Any, ...]) -> dict[str, Any]:
        """Return the process's answer. Raises SpecError, SubmissionRefused."""
        if self._process is None or not self._process.is_alive():
            self._start()
        assert self._pipe is not None
        try:
            self._pipe.send(task)
            if not self._pipe.poll(self._seconds):
                self.close()
                raise SubmissionRefused(f"reading this file and its data took longer than {self._seconds:g} seconds")
            kind, value, code = self._pipe.recv()
        except (EOFError, OSError):
            self.close()
            raise SubmissionRefused(
                f"the process that read this file was killed; it may use {self._bytes / (1 << 30):g} GiB of memory"
            ) from None
        match kind:
            case "done":
                return value
            case "problems":
                raise SpecError(value)
            case _:
                raise _error_of(value, code)

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None
        if self._pipe is not None:
            self._pipe.close()
            self._pipe = None

    def _start(self) -> None:
        self.close()
        context = multiprocessing.get_context("spawn")  # threads and locks of the service are not copied
        self._pipe, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, self._bytes), name="loader", daemon=True)
        process.start()
        self._process = process
        theirs.close()


def _error_of(refusal: tuple[str, str], code: int) -> OrchestrateError:
    """Return the error of a loading process, its message and its class: that of `orchestrator.errors`, where it is one.

    It has its sentence in place of what the class makes of its arguments.
    """
    message, name = refusal
    kind: object = getattr(errors, name, None)
    if not (isinstance(kind, type) and issubclass(kind, OrchestrateError)):
        return SubmissionRefused(message, code)
    found = kind.__new__(kind)
    Exception.__init__(found, message)
    found.code = ExitCode(code)
    return found


def _serve(pipe: Connection, most_bytes: int) -> None:
    """Answer tasks until the service ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in the service's terminal: the service ends this process
    resource.setrlimit(resource.RLIMIT_DATA, (most_bytes, most_bytes))
    with contextlib.suppress(EOFError, OSError):  # the service has ended
        while True:
            pipe.send(_answer(*pipe.recv()))


def _answer(
    kind: str, root: Path, rights: FileRights, text: str, overrides: Sequence[str], name: str | None
) -> tuple[str, Any, int]:
    """Return "done" and a value, "problems" and all mistakes of the file, or "refused" and a message; an exit code."""
    try:
        return "done", _TASKS[kind](root, rights, text, overrides, name), ExitCode.DONE
    except SpecError as error:
        return "problems", error.problems, ExitCode.USER
    except OrchestrateError as error:
        return "refused", (str(error), type(error).__name__), error.code
    except TrialError as error:
        return "refused", (str(error), ""), ExitCode.USER
    except MemoryError:
        return "refused", ("reading this file and its data takes too much memory", ""), ExitCode.USER


def _load(
    _root: Path, rights: FileRights, text: str, overrides: Sequence[str], name: str | None
) -> dict[str, Any]:  # imports in here: the service itself needs none of them
    from orchestrator.execution.slots import machine_gpus, plan_slots
    from orchestrator.spec.estimates.arrangement import arranged
    from orchestrator.spec.loading.serialization import dump_spec

    spec, notices = _checked(rights, text, overrides, name)
    chosen, _ = arranged(spec, [machine_gpus()], is_new=True)
    gpus = plan_slots(chosen).gpus_needed[0]
    return {"name": spec.name, "spec": dump_spec(spec), "gpus": gpus, "notices": notices}


def _plan(root: Path, rights: FileRights, text: str, overrides: Sequence[str], name: str | None) -> dict[str, Any]:
    from orchestrator.commands.local_plan import plan_locally

    spec, notices = _checked(rights, text, overrides, name)
    return plan_locally(spec, root, notices).as_json()


def _change(root: Path, rights: FileRights, text: str, overrides: Sequence[str], name: str | None) -> dict[str, Any]:
    from orchestrator.driver.run_sweep import change_settings
    from orchestrator.driver.spec_changes import with_overrides
    from orchestrator.execution.slots import machine_gpus, plan_slots
    from orchestrator.folders import SweepFolder
    from orchestrator.spec.estimates.arrangement import arranged
    from orchestrator.spec.loading.loader import load_spec, load_spec_text
    from orchestrator.spec.loading.serialization import dump_spec
    from orchestrator.study.sweep_terms import spec_differences

    assert name is not None
    folder = SweepFolder(root, name)
    if text:
        before = load_spec_text(text, folder.path, is_new=False)
        spec = with_overrides(before, overrides, rights)
        notices = [f"changed {change}" for change in spec_differences(before, spec)]
    else:
        notices = change_settings(name, root, overrides, rights)
        spec = load_spec(folder.spec, is_new=False)
    chosen, _ = arranged(spec, [machine_gpus()], is_new=False)
    return {
        "spec": dump_spec(spec) if text else "",
        "gpus": plan_slots(chosen).gpus_needed[0],
        "notices": tuple(notices),
    }


_TASKS = {"load": _load, "plan": _plan, "change": _change}
"""What a process does, by the first word of its task."""


def _checked(rights: FileRights, text: str, overrides: Sequence[str], name: str | None) -> tuple[Any, tuple[str, ...]]:
    """Load a sweep as the command line does."""
    from orchestrator.commands.data_preview import check_rows
    from orchestrator.spec.loading.loader import load_text_with_notices
    from orchestrator.spec.loading.position_checks import check_lengths

    loaded = load_text_with_notices(text, rights, overrides, name=name)
    lengths = check_lengths(loaded.spec, loaded.document)
    check_rows(loaded.spec, loaded.document)
    return loaded.spec, (*loaded.notices, *lengths)
