"""Command line interface. `main` is ready for signals before it imports the commands, which takes a second or two."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from types import FrameType

from orchestrator.errors import ExitCode
from orchestrator.terminal_streams import TERMINATION_SIGNALS, safe_streams

INTERRUPTED = "interrupted"
"""The sentence of a command that a signal ended before it had a handler of its own."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code; errors of the user are printed as a message without traceback.

    `arguments`: command line without the program name; None for `sys.argv`.
    """
    with safe_streams(), _termination_as_sigint():
        with _ended_by_signals():
            from orchestrator.cli.command_line import run
        return run(arguments)


@contextmanager
def _ended_by_signals() -> Generator[None]:
    """End the process at SIGINT, SIGTERM or SIGHUP: nothing has begun, and an import cannot be left by an exception.

    Signals that were blocked by who started the process (`stop_signals_blocked`) arrive here.
    """
    stops = (signal.SIGINT, *TERMINATION_SIGNALS)
    in_main_thread = threading.current_thread() is threading.main_thread()
    before = {s: signal.getsignal(s) for s in stops if in_main_thread and signal.getsignal(s) is not signal.SIG_IGN}
    for signum in before:
        signal.signal(signum, _end)
    if in_main_thread:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, stops)
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _end(_signum: int, _frame: FrameType | None) -> None:
    sys.stderr.write(f"{INTERRUPTED}\n")
    sys.stderr.flush()
    os._exit(int(ExitCode.INTERRUPTED))


@contextmanager
def _termination_as_sigint() -> Generator[None]:
    """Handle SIGTERM and SIGHUP like Ctrl-C in commands without a signal handler; a running sweep installs its own.

    A signal that is ignored, as SIGHUP under `nohup`, stays ignored.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    handled = [s for s in TERMINATION_SIGNALS if in_main_thread and signal.getsignal(s) is signal.SIG_DFL]
    for signum in handled:
        signal.signal(signum, signal.default_int_handler)
    try:
        yield
    finally:
        for signum in handled:
            signal.signal(signum, signal.SIG_DFL)
