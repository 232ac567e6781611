"""`StopReason`: why a run ended; and the handlers of SIGINT and SIGTERM."""

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
    """Everything but FINISHED leaves a sweep that can be resumed."""

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
    """A kind, and the words for the user."""

    kind: StopKind
    text: str = ""


class Interrupted(Exception):
    """A stage before the trials was interrupted; what it had done is kept."""


@contextmanager
def deaf_to_sigterm() -> Generator[None]:
    """Processes started while entered, and theirs, are never reached by SIGTERM; this one is, once it is left.

    `timeout`, systemd, Slurm and many containers send it to every process of a group at once. It is the driver's to
    answer: it needs Ray and its workers for the checkpoints, and ends them itself.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class SignalHandler:
    """SIGINT and SIGTERM while entered: the first asks, a second one ends the process at once.

    What arrives within ONE_REQUEST seconds is one request: `timeout` and `kill` of a group send to the process and to
    its group. Entered in the main thread only.
    """

    ONE_REQUEST = 0.3
    POLL = 0.5
    """Seconds between two looks at what `watching` watches."""
    MISSES = 4
    """So many looks in a row that find it lost."""

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
        for result in self._arrivals:
            os.set_blocking(result, False)
        self._earlier_fd = signal.set_wakeup_fd(self._arrivals[1], warn_on_full_buffer=False)
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._earlier_fd)
        for result in self._arrivals:
            os.close(result)
        self._arrivals = (-1, -1)
        for sign, handler in self._before.items():
            signal.signal(sign, handler)

    def install(self) -> None:
        """Take the signals (again: Ray takes SIGTERM when it starts, in C++ too)."""
        for sign in _SIGNALS:
            signal.signal(sign, self._on_signal)

    @contextmanager
    def watching(self, lost: Callable[[], bool]) -> Generator[None]:
        """While entered: after a signal, the process ends with its farewell once `lost()` stays true.

        Where Ray's own server is ended by the same signal, a call into Ray answers after a minute, by aborting the
        process, and until then not even Python's signal handlers run. So another thread looks. Whatever is committed
        is kept, as after `kill -9`.
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
