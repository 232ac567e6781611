"""Failpoints, at which tests kill a process.

With `ORCHESTRATE_FAILPOINT=file.rename:3` the process is killed when it reaches that point for the third time. Without
the variable failpoints do nothing.
"""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Iterator

FAILPOINT_VARIABLE = "ORCHESTRATE_FAILPOINT"
_passes: dict[str, Iterator[int]] = {}


def failpoint(name: str) -> None:
    """Send SIGKILL to this process if the variable names this point and this pass."""
    configured = os.environ.get(FAILPOINT_VARIABLE)
    if configured is None:
        return
    point, _, last = configured.partition(":")
    if point == name and next(_passes.setdefault(name, itertools.count(1))) == int(last or 1):
        os.kill(os.getpid(), signal.SIGKILL)
