"""An exception in a trial becomes data: its kind, its words, its traceback in the attempt's folder."""

from __future__ import annotations

import errno
import traceback
from pathlib import Path

from orchestrator.engine.messages import End, EndKind
from orchestrator.study.state import FailureKind
from orchestrator.tracking.secrets import redact
from trainer.data.check import BadData

FAILURE_FILE = "failure.txt"
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}
_DISK_WORDS = ("No space left on device", "StorageFull", "Disk quota exceeded")
_MEMORY_WORDS = ("out of memory", "can't allocate memory", "not enough memory")


class WorkerLost(Exception):
    """A process that a trial needs has ended: no outcome of the trial, which is issued again."""


class Told(Exception):
    """An exception in another process, which has made it an end already."""

    def __init__(self, end: End) -> None:
        super().__init__(end.reason)
        self.end = end


def ended_by(error: Exception, folder: Path) -> End:
    """The end that this exception means; its traceback goes to `folder/failure.txt`."""
    if isinstance(error, Told):
        return error.end
    reason = redact(f"{type(error).__name__}: {_first_line(error)}")
    if disk_refused(error):
        return End(EndKind.NO_DISK, reason)
    kind = classify(error)
    folder.mkdir(parents=True, exist_ok=True)
    told = redact("".join(traceback.format_exception(error)))  # libraries put tokens into their errors
    (folder / FAILURE_FILE).write_text(told, encoding="utf-8")
    return End(EndKind.FAILED, reason, failure=kind, signature=signature(error))


def classify(error: Exception) -> FailureKind:
    """Memory, data, or else a bug."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return FailureKind.OUT_OF_MEMORY
    if isinstance(error, RuntimeError) and any(words in str(error) for words in _MEMORY_WORDS):
        return FailureKind.OUT_OF_MEMORY  # what torch says on a CPU
    if isinstance(error, BadData):
        return FailureKind.DATA
    return FailureKind.BUG


def signature(error: Exception) -> str:
    """Type and place: equal for one bug, whatever numbers its message carries."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"
    return f"{type(error).__name__} at {place}"


def disk_refused(error: BaseException | None) -> bool:
    """Whether a full, exhausted or read-only disk is behind it."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _DISK:
            return True
        if any(words in str(error) for words in _DISK_WORDS):
            return True
        error = error.__cause__
    return False


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else "no message"
