"""`DriverSupervisor`: starts the drivers of queued sweeps, finds those of an earlier service, resumes those that died.

A driver is a process of its own. It inherits a locked file, `service/drivers/NAME.lock`: the kernel holds that lock as
long as the driver lives, whatever becomes of the service, so that a service that starts again knows which drivers live
without comparing process numbers, and starts none twice.
"""

from __future__ import annotations

import fcntl
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from orchestrator import folders
from orchestrator.commands.detached_driver import start_in_own_session
from orchestrator.commands.runs_folder.queue_records import SERVICE_FOLDER
from orchestrator.commands.status import sweep_state
from orchestrator.errors import JUDGING, ExitCode, OrchestrateError, first_line
from orchestrator.execution.stop_reasons import is_requested
from orchestrator.folders import SweepFolder
from orchestrator.gpu_locks import gpu_holders
from orchestrator.gpus import visible_devices
from orchestrator.redaction import redact
from orchestrator.service.sweep_queue import MOST_DEATHS, QueuedSweep, QueueRefused, QueueState, SweepQueue
from orchestrator.study.study import Study
from orchestrator.study.trial_records import ABANDONED, STOPPING
from trainer.storage.atomic_files import write_text
from trainer.storage.failpoints import failpoint
from trainer.storage.file_lock import FileLock

_SHELL = (
    'echo "$1 $$" > "$0.started" || exit 5; launch=$1; shift; trap : INT TERM HUP; "$@"; '
    'code=$?; echo "$launch $code" > "$0.new" && mv "$0.new" "$0.ended"'
)
"""Records that the driver begins, its process group and its exit code, which a service that is not its parent cannot
ask for."""
_DRIVERS = "drivers"
_LAST_BYTES = 4096
_NOT_BEGUN = "stopped before its first trial"


class ServiceRuns(OrchestrateError):
    """Another service has this runs folder."""

    code = ExitCode.LOCKED

    def __init__(self, root: Path, holder: str) -> None:
        self.holder = holder
        super().__init__(f"a service for {root} runs already: {holder or 'it is just starting'}")


def lock_service(root: Path) -> FileLock:
    """Return the held lock of the one service of a runs folder. Raises ServiceRuns."""
    lock = FileLock(root / SERVICE_FOLDER / "serve.lock", f"pid {os.getpid()}")
    if not lock.acquire(0.0):
        raise ServiceRuns(root, lock.holder() or "")
    return lock


@dataclass(frozen=True, slots=True)
class _Ended:
    """What the service does about a driver that has ended."""

    state: QueueState
    """WAITING: another driver resumes the sweep."""
    why: str
    counts: bool = True


def orchestrate_command(file: Path) -> list[str]:
    """Return the command of a sweep's driver: it begins the sweep, or resumes it where it has begun.

    An empty file is of a sweep that a command began: it is resumed as it is.
    """
    if not file.stat().st_size:
        return [sys.executable, "-m", "orchestrator.cli", "resume", "--", file.stem]
    return [sys.executable, "-m", "orchestrator.cli", "sweep", "--continue", "--", str(file)]


def interrupt_driver(root: Path, sweep: QueuedSweep) -> bool:
    """Send SIGINT to the driver that a service started for a sweep, as Ctrl-C does; return whether there is one.

    A driver that has no study yet, as its data is prepared or its GPUs are taken, reads no requests.
    """
    folder = root / SERVICE_FOLDER / _DRIVERS
    if FileLock(folder / f"{sweep.name}.lock").holder() is None:
        return False
    try:
        launch, group = _started(folder / f"{sweep.name}.started")
        if launch != str(sweep.launch) or not group:  # no process yet, or one of an older version
            return False
        write_text(folder / f"{sweep.name}.interrupted", launch)
        os.killpg(int(group), signal.SIGINT)
    except (FileNotFoundError, ProcessLookupError):
        return False
    return True


def interrupt_judge(root: Path, name: str) -> bool:
    """Send SIGINT to the process of this machine that judges a sweep; return whether there is one."""
    holder = folders.lock_holder(SweepFolder(root, name)) or ""
    found = re.fullmatch(rf"pid (\d+) on {re.escape(socket.gethostname())}, .*{JUDGING}", holder)
    if found is None:
        return False
    try:
        os.kill(int(found.group(1)), signal.SIGINT)
    except ProcessLookupError:
        return False
    return True


def _started(file: Path) -> tuple[str, str]:
    """Return number and process group of the newest driver that began; of older versions "" for the group."""
    launch, _, group = file.read_text(encoding="ascii").strip().partition(" ")
    return launch, group


class DriverSupervisor:
    """The drivers of one runs folder's queue; one at a time for each folder."""

    def __init__(
        self,
        root: Path,
        queue: SweepQueue,
        *,
        at_once: int | None = None,
        command: Callable[[Path], Sequence[str]] = orchestrate_command,
    ) -> None:
        """Take the runs folder.

        Args:
            root: the runs folder.
            queue: its queue.
            at_once: sweeps that run at a time; None: as many as this machine has GPUs, at least one.
            command: the command of a driver, given the sweep's file.

        Raises:
            ServiceRuns: another service has it.
        """
        self._root, self._queue, self._command = root, queue, command
        self._at_once = at_once
        self._is_first_step = True
        self._children: list[subprocess.Popen[bytes]] = []
        self._folder = root / SERVICE_FOLDER / _DRIVERS
        self._folder.mkdir(parents=True, exist_ok=True)
        self._lock = lock_service(root)

    def close(self) -> None:
        """Give the runs folder free; its drivers continue."""
        for child in self._children:
            child.returncode = child.poll() or 0  # it is not waited for: it continues after this process
        self._lock.release()

    def step(self) -> None:
        """Look at every driver once, then start the waiting sweeps whose turn it is."""
        self._children = [child for child in self._children if child.poll() is None]
        living: list[QueuedSweep] = []
        for sweep in self._queue.sweeps((QueueState.DRIVEN,)):
            if self._lives(sweep):
                living.append(sweep)
            else:
                self._record_end(sweep)
        if self._is_first_step:
            for sweep in living:
                self._queue.record_adoption(sweep.name)
            self._is_first_step = False
        for sweep in self._queue.sweeps((QueueState.WAITING,)):
            if not self._may_start(sweep, living):
                return  # no later one overtakes it
            if (started := self._start(sweep)) is not None:
                living.append(started)

    def _lives(self, sweep: QueuedSweep) -> bool:
        """Return whether a driver of the sweep lives, started by a service or by a person."""
        folder = SweepFolder(self._root, sweep.name)
        return FileLock(self._path(sweep, "lock")).holder() is not None or folders.lock_holder(folder) is not None

    def _may_start(self, sweep: QueuedSweep, living: Sequence[QueuedSweep]) -> bool:
        devices = visible_devices()
        if len(living) >= (self._at_once or max(1, len(devices))):
            return False
        if not sweep.gpus:
            return True
        holders = gpu_holders(devices)
        having = {holder.sweep for holder in holders.values()}
        # A driver that was just started takes its GPUs a few seconds later.
        have_gpus = all(other.name in having for other in living if other.gpus)
        return have_gpus and len(devices) - len(holders) >= sweep.gpus

    def _start(self, sweep: QueuedSweep) -> QueuedSweep | None:
        """Start a driver; None where one of an earlier service lives, or the sweep was just withdrawn."""
        with ExitStack() as stack:
            lock = os.open(self._path(sweep, "lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            stack.callback(os.close, lock)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return None
            try:
                sweep = self._queue.begin_launch(sweep.name, _boot())
            except QueueRefused:  # a request came between
                return None
            failpoint("service.launch")
            file, log = self._path(sweep, "yaml"), SweepFolder(self._root, sweep.name).log
            write_text(file, sweep.spec)
            log.parent.mkdir(parents=True, exist_ok=True)
            marks = str(self._folder / sweep.name)
            with log.open("ab") as output:
                shell = ["/bin/sh", "-c", _SHELL, marks, str(sweep.launch), *self._command(file)]
                child = start_in_own_session(shell, self._root, output, [lock])
            failpoint("service.launched")
            self._children.append(child)
        return sweep

    def _record_end(self, sweep: QueuedSweep) -> None:
        """Record how the sweep's driver ended; one that died is followed by another."""
        ended = self._ended(sweep)
        if ended.state is QueueState.WAITING:
            self._queue.record_death(sweep.name, sweep.launch, ended.why, MOST_DEATHS if ended.counts else None)
        else:
            self._queue.end(sweep.name, ended.state, ended.why)

    def _ended(self, sweep: QueuedSweep) -> _Ended:
        started, code = self._marks(sweep)
        if not started:
            return _Ended(QueueState.WAITING, "the service ended before it had started the driver", counts=False)
        state, reason = self._of_study(sweep)
        if state == "finished":
            return _Ended(QueueState.FINISHED, "")
        if state == ABANDONED or is_requested(reason):
            return _Ended(QueueState.STOPPED, reason)
        interrupted = self._path(sweep, "interrupted")
        if not state and interrupted.is_file() and interrupted.read_text(encoding="ascii") == str(sweep.launch):
            return _Ended(QueueState.STOPPED, _NOT_BEGUN)  # whatever its code: a signal may end Python as it starts
        if sweep.boot != _boot():
            return _Ended(QueueState.WAITING, "the machine was started again", counts=False)
        why = reason or self._last_words(sweep)
        match code:
            case ExitCode.DONE | ExitCode.TRIALS_FAILED:
                return _Ended(QueueState.FINISHED, reason)
            case ExitCode.INTERRUPTED:
                return _Ended(QueueState.STOPPED, reason or ("interrupted" if state else _NOT_BEGUN))
            case ExitCode.USER | ExitCode.NO_TRIAL_COMPLETED:
                return _Ended(QueueState.FAILED, why)
            case ExitCode.LOCKED:
                return _Ended(QueueState.WAITING, "another process drove the sweep", counts=False)
            case None:
                return _Ended(QueueState.WAITING, "the driver was killed")
            case _ if code > 128:
                return _Ended(QueueState.WAITING, f"the driver was ended by signal {code - 128}")
            case _:
                return _Ended(QueueState.WAITING, why or f"the driver ended with exit code {code}")

    def _marks(self, sweep: QueuedSweep) -> tuple[bool, int | None]:
        """Return whether the newest driver was started, and its exit code if that is known."""
        started, ended = self._path(sweep, "started"), self._path(sweep, "ended")
        if not started.is_file() or _started(started)[0] != str(sweep.launch):
            return False, None
        launch, _, code = ended.read_text(encoding="ascii").partition(" ") if ended.is_file() else ("", "", "")
        return True, int(code) if launch == str(sweep.launch) else None

    def _of_study(self, sweep: QueuedSweep) -> tuple[str, str]:
        """Return the sweep's state, and why it ended under its newest driver; "" where that wrote nothing."""
        folder = SweepFolder(self._root, sweep.name)
        if not Study.exists(folder):
            return "", ""
        began = self._path(sweep, "started").stat().st_mtime
        with Study.open(folder, read_only=True) as study:
            last = next((event for event in reversed(study.events()) if event.kind == STOPPING), None)
            reason = study.stop_reason() if last is not None and last.at >= began else ""
            return sweep_state(study), first_line(reason) if reason else ""

    def _last_words(self, sweep: QueuedSweep) -> str:
        """Return the last line of the driver's log."""
        log = SweepFolder(self._root, sweep.name).log
        if not log.is_file():
            return ""
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _LAST_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
        return redact(next((line.strip() for line in reversed(lines) if line.strip()), ""))

    def _path(self, sweep: QueuedSweep, suffix: str) -> Path:
        return self._folder / f"{sweep.name}.{suffix}"


def _boot() -> str:
    """Return what tells one start of this machine from another, and in a container one start of the container."""
    try:
        first = Path("/proc/1/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:  # hidden from users
        return folders.boot_id()
    return f"{folders.boot_id()} {first[19]}"  # the start of process 1, see proc(5)
