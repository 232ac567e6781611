"""Where tests kill a process: with `ORCHESTRATE_FAILPOINT=file.rename:3` the third pass of that point is its last.

A point stands before or after each step of a write that has to be whole or absent. Without the variable it is nothing.
"""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Iterator

VARIABLE = "ORCHESTRATE_FAILPOINT"
_passes: dict[str, Iterator[int]] = {}


def failpoint(name: str) -> None:
    """SIGKILL to this process where the variable names this point and this pass."""
    asked = os.environ.get(VARIABLE)
    if asked is None:
        return
    point, _, last = asked.partition(":")
    if point == name and next(_passes.setdefault(name, itertools.count(1))) == int(last or 1):
        os.kill(os.getpid(), signal.SIGKILL)
