"""`start_detached`: a driver in a session of its own, which outlives the terminal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from orchestrator.errors import ExitCode, StudyMissing
from orchestrator.execution.stop_reasons import stop_signals_blocked
from orchestrator.folders import WAITING_FILE, SweepFolder
from orchestrator.study.study import Study
from orchestrator.study.trial_records import DRIVER_EVENT

_POLL_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class DetachedDriver:
    """A driver process. `code`: its exit code where it ended before it drove the sweep, else None."""

    pid: int
    log: Path
    code: int | None
    waiting: str = ""
    """For whose GPUs it waits before it drives the sweep."""


def start_in_own_session(
    command: Sequence[str], root: Path, output: IO[bytes], locks: Sequence[int] = ()
) -> subprocess.Popen[bytes]:
    """Start a process on the runs folder `root` that outlives this one, its terminal and its service.

    Args:
        command: what runs; `orchestrate` in it works here, whatever `ORCHESTRATE_SERVER` says.
        root: the runs folder.
        output: takes stdout and stderr.
        locks: open files whose locks the process keeps while it lives.
    """
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        start_new_session=True,
        pass_fds=locks,
        env=os.environ | {"ORCHESTRATE_HOME": str(root), "ORCHESTRATE_SERVER": ""},
    )


def start_detached(folder: SweepFolder, arguments: Sequence[str], show: Callable[[str], None]) -> DetachedDriver:
    """Run `orchestrate ARGUMENTS` in a session of its own; return once it drives the sweep, waits for a GPU or ended.

    Args:
        folder: the sweep's folder, which need not exist yet.
        arguments: the command line.
        show: receives the driver's output until then.
    """
    log = folder.log
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        began = output.tell()
        with stop_signals_blocked():
            process = start_in_own_session([sys.executable, "-m", "orchestrator.cli", *arguments], folder.root, output)
    with log.open("rb") as reader:
        reader.seek(began)
        waiting = ""
        while (code := process.poll()) is None and not _drives(folder, process.pid):
            if waiting := waiting_for(folder, process.pid):
                break
            show(reader.read().decode(errors="replace"))
            time.sleep(_POLL_SECONDS)
        show(reader.read().decode(errors="replace"))
    process.returncode = 0 if code is None else code  # it is not waited for: it continues after this process
    if code is None:
        return DetachedDriver(process.pid, log, None, waiting)
    log.unlink()  # it has been shown
    for path in (log.parent, folder.root):
        with suppress(OSError):  # not empty
            path.rmdir()
    if code < 0:
        show(f"the driver was ended by {signal.Signals(-code).name}\n")
        code = int(ExitCode.INTERNAL_ERROR)
    return DetachedDriver(process.pid, log, code)


def waiting_for(folder: SweepFolder, pid: int | None = None) -> str:
    """Return for whose GPUs the sweep's driver waits, if it waits; `pid`: only if this process is the driver."""
    try:
        waiter, _, sentence = (folder.path / WAITING_FILE).read_text(encoding="utf-8").partition("\n")
    except FileNotFoundError:
        return ""
    return sentence.strip() if pid is None or waiter == str(pid) else ""


def _drives(folder: SweepFolder, pid: int) -> bool:
    """Return whether this process has acquired the sweep's lease."""
    if not Study.exists(folder):
        return False
    try:
        with Study.open(folder) as study:
            return any(e.kind == DRIVER_EVENT and e.text.startswith(f"pid {pid} on ") for e in study.events())
    except StudyMissing:  # its tables are just being created
        return False
