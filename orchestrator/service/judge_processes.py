"""Judges that the service starts: processes that outlive it, and what it knows of one afterwards.

Beside a sweep's votes, in its folder `judge`, are `process.lock`, which the kernel holds while the judge lives, and how
it began and ended: a judge that failed is shown so until another one begins or succeeds.
"""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from orchestrator.commands.detached_driver import start_in_own_session
from orchestrator.driver.judge_stage import JUDGE_FILE, JUDGE_FOLDER
from orchestrator.errors import ExitCode
from orchestrator.folders import SweepFolder
from orchestrator.redaction import redact
from orchestrator.service.sweep_queue import QueueRefused
from trainer.storage.file_lock import FileLock

RUNNING, FAILED = "running", "failed"
_MARKS = "process"
_SHELL = (
    'echo "$$" > "$0.began" || exit 5; log=$1; old=$2; shift 2; trap : INT TERM HUP; "$@"; code=$?; '
    'tail -c "+$((old + 1))" "$log" | tail -c 4096 > "$0.words"; echo "$code" > "$0.new" && mv "$0.new" "$0.ended"'
)
"""Records the judge's process group, its last words and its exit code; what it writes is in the sweep's log."""
_WORDS = 3
"""Lines of a judge's last words."""


@dataclass(frozen=True, slots=True)
class Judging:
    """A judge that runs or has failed. `since`: when it began or ended, in seconds since 1970."""

    state: str
    since: float
    why: str = ""
    """Its last words."""

    def as_json(self) -> dict[str, Any]:
        """Return what the API and the page's events say."""
        return asdict(self)


def begin_judging(folder: SweepFolder, options: Sequence[str]) -> subprocess.Popen[bytes]:
    """Start `orchestrate judge OPTIONS NAME`; what is known of an earlier judge is forgotten.

    Raises:
        QueueRefused: one has just been started.
    """
    marks = _marks(folder)
    marks.parent.mkdir(parents=True, exist_ok=True)
    folder.log.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        lock = os.open(_file(folder, "lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        stack.callback(os.close, lock)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise QueueRefused(f"{folder.name} is being judged already") from None
        for suffix in ("began", "words", "ended"):
            _file(folder, suffix).unlink(missing_ok=True)
        output = stack.enter_context(folder.log.open("ab"))
        command = [sys.executable, "-m", "orchestrator.cli", "judge", *options, "--", folder.name]
        shell = ["/bin/sh", "-c", _SHELL, str(marks), str(folder.log), str(output.tell()), *command]
        return start_in_own_session(shell, folder.root, output, [lock])


def judging(folder: SweepFolder) -> Judging | None:
    """Return the judge that a service started and that runs or has failed; None where the last one did neither."""
    began, ended, published = (
        _time(path)
        for path in (_file(folder, "began"), _file(folder, "ended"), folder.path / JUDGE_FOLDER / JUDGE_FILE)
    )
    held = _file(folder, "lock")
    if FileLock(held).holder() is not None:
        return Judging(RUNNING, began or held.stat().st_mtime)
    if began is None:
        return None
    code = None if ended is None else int(_file(folder, "ended").read_text(encoding="ascii"))
    since = began if ended is None else ended
    if code in (ExitCode.DONE, ExitCode.INTERRUPTED) or (published is not None and published > since):
        return None  # it succeeded, was stopped, or another one has succeeded
    words = _last_words(folder)
    if code is None or code > 128:
        words.append("the judge was killed" if code is None else f"the judge was ended by signal {code - 128}")
    return Judging(FAILED, since, "\n".join(words))


def interrupt_starting_judge(folder: SweepFolder) -> bool:
    """Send SIGINT to a judge that a service started and that has not begun to work; return whether there is one."""
    found = judging(folder)
    if found is None or found.state != RUNNING:
        return False
    with suppress(FileNotFoundError, ProcessLookupError, ValueError):  # it is just being started, or has just ended
        os.killpg(int(_file(folder, "began").read_text(encoding="ascii")), signal.SIGINT)
        return True
    return False


def _marks(folder: SweepFolder) -> Path:
    return folder.path / JUDGE_FOLDER / _MARKS


def _file(folder: SweepFolder, suffix: str) -> Path:
    return _marks(folder).with_suffix(f".{suffix}")


def _time(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return None


def _last_words(folder: SweepFolder) -> list[str]:
    path = _file(folder, "words")
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    lines = [line.strip() for line in redact(text).splitlines()]
    return [line for line in lines if line][-_WORDS:]
