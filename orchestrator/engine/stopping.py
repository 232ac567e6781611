"""Why a run of the engine ended, and the signals that end it."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from types import FrameType
from typing import Self

from orchestrator.errors import ExitCode


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
class Stop:
    """A kind, and the words for the user."""

    kind: StopKind
    text: str = ""


class Interrupted(Exception):
    """A stage before the trials was interrupted; what it had done is kept."""


class Interrupt:
    """SIGINT and SIGTERM while entered: the first asks, the second ends the process at once."""

    def __init__(self, farewell: Callable[[], str]) -> None:
        self.asked = False
        self._farewell = farewell
        self._before: dict[int, signal.Handlers | int | Callable[[int, FrameType | None], object] | None] = {}

    def __enter__(self) -> Self:
        for sign in (signal.SIGINT, signal.SIGTERM):
            self._before[sign] = signal.getsignal(sign)
        self.listen()
        return self

    def __exit__(self, *_: object) -> None:
        for sign, handler in self._before.items():
            signal.signal(sign, handler)

    def listen(self) -> None:
        """Take the signals (again: Ray takes SIGTERM when it starts)."""
        for sign in (signal.SIGINT, signal.SIGTERM):
            signal.signal(sign, self._on_signal)

    def _on_signal(self, _sign: int, _frame: FrameType | None) -> None:
        if not self.asked:
            self.asked = True
            return
        sys.stderr.write(f"\n{self._farewell()}\n")
        sys.stderr.flush()
        os._exit(int(ExitCode.INTERRUPTED))
