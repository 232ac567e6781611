"""`StopReason`: why a run ended; `SignalHandler`: the stop signals, SIGINT, SIGTERM and SIGHUP."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from types import FrameType
from typing import Self

from orchestrator.errors import ExitCode
from orchestrator.study import trial_records
from orchestrator.terminal_streams import TERMINATION_SIGNALS

_SIGNALS = (signal.SIGINT, *TERMINATION_SIGNALS)


class StopKind(StrEnum):
    """Kind of stop; after any but FINISHED the sweep can be resumed."""

    FINISHED = "finished"
    INTERRUPTED = "interrupted"
    STOPPED = "stopped"
    ABANDONED = trial_records.ABANDONED
    PAUSED = "paused"
    ONLY_PAUSED_LEFT = "paused trials are left"
    OUT_OF_BUDGET = "out of budget"
    TARGET = "target reached"
    SAME_BUG = "same bug"
    WORKERS_LOST = "workers lost"
    NO_DISK = "no disk"


_OF_A_PERSON = (StopKind.STOPPED, StopKind.ABANDONED, StopKind.PAUSED, StopKind.ONLY_PAUSED_LEFT)
_FAULTS = (StopKind.SAME_BUG, StopKind.WORKERS_LOST, StopKind.NO_DISK)


def is_requested(reason: str) -> bool:
    """Return whether a person asked for the stop with this reason, as a study stores it."""
    return reason.startswith(tuple(kind.value for kind in _OF_A_PERSON))


def is_deliberate(reason: str) -> bool:
    """Return whether a person, a signal or the sweep's own limits ended it; not a fault, and not its death ("")."""
    known = tuple(kind.value for kind in StopKind if kind not in _FAULTS)
    return bool(reason) and reason.startswith(known)


@dataclass(frozen=True, slots=True)
class StopReason:
    """Why a sweep stopped: kind, and a message for the user."""

    kind: StopKind
    text: str = ""

    def __str__(self) -> str:
        """Return kind and message; a message that begins with the kind stands alone."""
        if not self.text or self.text.startswith(self.kind.value):
            return self.text or self.kind.value
        return f"{self.kind.value}: {self.text}"


def exit_code(kind: StopKind, *, any_complete: bool, any_failed: bool) -> ExitCode:
    """Return the exit code of `sweep` and `resume`.

    Args:
        kind: why the sweep stopped.
        any_complete: whether a trial is complete.
        any_failed: whether a configuration failed and was never trained to its end.
    """
    match kind:
        case StopKind.INTERRUPTED | StopKind.STOPPED | StopKind.ABANDONED | StopKind.PAUSED | StopKind.ONLY_PAUSED_LEFT:
            return ExitCode.INTERRUPTED
        case StopKind.NO_DISK:
            return ExitCode.REFUSED
        case StopKind.WORKERS_LOST:
            return ExitCode.INTERNAL_ERROR
        case StopKind.SAME_BUG:
            return ExitCode.INTERNAL_ERROR if any_complete else ExitCode.NO_TRIAL_COMPLETED
        case StopKind.FINISHED | StopKind.OUT_OF_BUDGET | StopKind.TARGET:
            if not any_complete:
                return ExitCode.NO_TRIAL_COMPLETED
            return ExitCode.TRIALS_FAILED if any_failed else ExitCode.DONE


class StageInterrupted(Exception):
    """A stage was interrupted by a signal; its finished work is kept."""


@contextmanager
def termination_blocked() -> Generator[None]:
    """Block SIGTERM and SIGHUP for processes started in the context and their children; here only within it.

    `timeout`, systemd, Slurm and containers send SIGTERM to all processes of a group, a terminal that closes sends
    SIGHUP. Only the driver must handle them, because it still needs Ray and the workers to save checkpoints, and ends
    them afterwards.
    """
    with _blocked(TERMINATION_SIGNALS):
        yield


@contextmanager
def stop_signals_blocked() -> Generator[None]:
    """Block all stop signals for drivers and judges that are started in the context, until their `main` handles them.

    One that comes while Python starts would leave a traceback, or end the process as if it had died.
    """
    with _blocked(_SIGNALS):
        yield


@contextmanager
def _blocked(signals: Collection[signal.Signals]) -> Generator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class SignalHandler:
    """Handles SIGINT, SIGTERM and SIGHUP in the context: the first sets `received`, a second one ends the process.

    Signals within SAME_SIGNAL_SECONDS count as one, as `timeout` and `kill` of a group send two. SIGHUP is never the
    second one, as shell and kernel each send it when a terminal closes; under `nohup` it stays ignored. Must be entered
    in the main thread.
    """

    SAME_SIGNAL_SECONDS = 0.3
    """Seconds within which two signals count as one."""
    POLL_SECONDS = 0.5
    """Seconds between two checks of `exit_when_lost`."""
    MAX_FAILED_CHECKS = 4
    """Consecutive failed checks after which `exit_when_lost` ends the process."""

    def __init__(self, message: Callable[[], str], clock: Callable[[], float] = time.monotonic) -> None:
        self.received = False
        self._message, self._clock = message, clock
        self._first_signal_at = 0.0
        self._before: dict[int, signal.Handlers | int | Callable[[int, FrameType | None], object] | None] = {}
        self._wakeup_pipe = (-1, -1)
        self._earlier_fd = -1

    def __enter__(self) -> Self:
        for signum in _SIGNALS:
            self._before[signum] = signal.getsignal(signum)
        self.install()
        self._wakeup_pipe = os.pipe()
        for fd in self._wakeup_pipe:
            os.set_blocking(fd, False)
        self._earlier_fd = signal.set_wakeup_fd(self._wakeup_pipe[1], warn_on_full_buffer=False)
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._earlier_fd)
        for fd in self._wakeup_pipe:
            os.close(fd)
        self._wakeup_pipe = (-1, -1)
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def install(self) -> None:
        """Install the handlers; again after Ray's start, which replaces the one of SIGTERM."""
        for signum in _SIGNALS:
            if signal.getsignal(signum) is not signal.SIG_IGN:
                signal.signal(signum, self._on_signal)

    @contextmanager
    def exit_when_lost(self, lost: Callable[[], bool]) -> Generator[None]:
        """After a signal, end the process with its message once `lost()` stays true; checked by a thread.

        If the same signal ends Ray's server, a call into Ray blocks for a minute, without running Python's signal
        handlers, and then aborts the process. Committed work is kept, as after `kill -9`.
        """
        over = threading.Event()
        thread = threading.Thread(target=self._watch, args=(lost, over), name="signals", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def _watch(self, lost: Callable[[], bool], over: threading.Event) -> None:
        arrived, failed_checks = self.received, 0
        while not over.wait(self.POLL_SECONDS):
            arrived = arrived or self.received or self._has_arrived()
            failed_checks = failed_checks + 1 if arrived and lost() else 0
            if failed_checks == self.MAX_FAILED_CHECKS:
                self._exit_now()

    def _has_arrived(self) -> bool:
        try:
            return any(signum in _SIGNALS for signum in os.read(self._wakeup_pipe[0], 4096))
        except BlockingIOError:
            return False

    def _on_signal(self, signum: int, _frame: FrameType | None) -> None:
        if not self.received:
            self.received, self._first_signal_at = True, self._clock()
        elif signum != signal.SIGHUP and self._clock() - self._first_signal_at > self.SAME_SIGNAL_SECONDS:
            self._exit_now()

    def _exit_now(self) -> None:
        sys.stderr.write(f"\n{self._message()}\n")
        sys.stderr.flush()
        os._exit(int(ExitCode.INTERRUPTED))
