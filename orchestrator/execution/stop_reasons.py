"""`StopReason`: why a run ended; `SignalHandler`: SIGINT and SIGTERM."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from types import FrameType
from typing import Self

from orchestrator.errors import ExitCode

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopKind(StrEnum):
    """Kind of stop; after any but FINISHED the sweep can be resumed."""

    FINISHED = "finished"
    INTERRUPTED = "interrupted"
    STOPPED = "stopped"
    PAUSED = "paused"
    PUT_ASIDE = "paused trials are left"
    OUT_OF_BUDGET = "out of budget"
    TARGET = "target reached"
    SAME_BUG = "same bug"
    WORKERS_LOST = "workers lost"
    NO_DISK = "no disk"


@dataclass(frozen=True, slots=True)
class StopReason:
    """Why a sweep stopped: kind, and a message for the user."""

    kind: StopKind
    text: str = ""


class Interrupted(Exception):
    """A stage was interrupted by a signal; its finished work is kept."""


@contextmanager
def deaf_to_sigterm() -> Generator[None]:
    """Block SIGTERM for processes started in the context and their children; for this process only within it.

    `timeout`, systemd, Slurm and containers send SIGTERM to all processes of a group. Only the driver must handle it,
    because it still needs Ray and the workers to save checkpoints, and ends them afterwards.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class SignalHandler:
    """Handles SIGINT and SIGTERM in the context: the first sets `stop_requested`, a second one ends the process.

    Signals within ONE_REQUEST seconds count as one, as `timeout` and `kill` of a group send two. Must be entered in the
    main thread.
    """

    ONE_REQUEST = 0.3
    """Seconds."""
    POLL = 0.5
    """Seconds between two checks of `watching`."""
    MISSES = 4
    """Consecutive failed checks after which `watching` ends the process."""

    def __init__(self, message: Callable[[], str], clock: Callable[[], float] = time.monotonic) -> None:
        self.stop_requested = False
        self._message, self._clock = message, clock
        self._asked_at = 0.0
        self._before: dict[int, signal.Handlers | int | Callable[[int, FrameType | None], object] | None] = {}
        self._arrivals = (-1, -1)
        self._earlier_fd = -1

    def __enter__(self) -> Self:
        for sign in _SIGNALS:
            self._before[sign] = signal.getsignal(sign)
        self.install()
        self._arrivals = os.pipe()
        for fd in self._arrivals:
            os.set_blocking(fd, False)
        self._earlier_fd = signal.set_wakeup_fd(self._arrivals[1], warn_on_full_buffer=False)
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._earlier_fd)
        for fd in self._arrivals:
            os.close(fd)
        self._arrivals = (-1, -1)
        for sign, handler in self._before.items():
            signal.signal(sign, handler)

    def install(self) -> None:
        """Install the handlers; again after Ray's start, which replaces the one of SIGTERM."""
        for sign in _SIGNALS:
            signal.signal(sign, self._on_signal)

    @contextmanager
    def watching(self, lost: Callable[[], bool]) -> Generator[None]:
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
        arrived, misses = self.stop_requested, 0
        while not over.wait(self.POLL):
            arrived = arrived or self.stop_requested or self._has_arrived()
            misses = misses + 1 if arrived and lost() else 0
            if misses == self.MISSES:
                self._leave()

    def _has_arrived(self) -> bool:
        try:
            return any(sign in _SIGNALS for sign in os.read(self._arrivals[0], 4096))
        except BlockingIOError:
            return False

    def _on_signal(self, _sign: int, _frame: FrameType | None) -> None:
        if not self.stop_requested:
            self.stop_requested, self._asked_at = True, self._clock()
        elif self._clock() - self._asked_at > self.ONE_REQUEST:
            self._leave()

    def _leave(self) -> None:
        sys.stderr.write(f"\n{self._message()}\n")
        sys.stderr.flush()
        os._exit(int(ExitCode.INTERRUPTED))
