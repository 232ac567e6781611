"""A server that ends with the program that started it, however that ends: run as a script, it runs the server.

`python tied_process.py SECONDS COMMAND...` ends the command, and all that it has started, once its standard input ends:
the program holds the other end, which the system closes after a kill too. After SECONDS the command is killed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress


def tied_command(seconds: float, command: Sequence[str]) -> list[str]:
    """Return the command of a process to be started with `stdin=PIPE`; closing its `stdin` ends the server."""
    return [sys.executable, "-P", __file__, str(seconds), *command]


def main(seconds: float, command: Sequence[str]) -> int:
    """Run the command until it or standard input ends; return its exit code."""
    for each in (signal.SIGINT, signal.SIGHUP):  # of the terminal: the program decides whether it ends
        signal.signal(each, _ignore)
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)

    def end(number: int = signal.SIGTERM) -> None:
        with suppress(ProcessLookupError):  # all of them have ended
            os.killpg(server.pid, number)

    def end_with_input() -> None:
        while os.read(0, 1024):
            continue
        end()
        try:
            server.wait(seconds)
        except subprocess.TimeoutExpired:
            end(signal.SIGKILL)

    signal.signal(signal.SIGTERM, lambda number, frame: end())  # noqa: ARG005
    threading.Thread(target=end_with_input, daemon=True).start()
    code = server.wait()
    end(signal.SIGKILL)  # workers of a server that was killed
    return code


def _ignore(_number: int, _frame: object) -> None:
    """Handle a signal by nothing; unlike SIG_IGN this does not pass to the command."""


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), sys.argv[2:]))
