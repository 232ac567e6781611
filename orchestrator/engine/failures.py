"""An exception in a trial becomes data: its kind, its words, its traceback in the attempt's folder."""

from __future__ import annotations

import errno
import re
import traceback
from collections.abc import Iterator
from pathlib import Path

from orchestrator.engine.messages import End, EndKind
from orchestrator.study.state import FailureKind
from orchestrator.tracking.secrets import redact
from trainer.data.check import BadData

FAILURE_FILE = "failure.txt"
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}
_DISK_WORDS = ("No space left on device", "StorageFull", "Disk quota exceeded")
_MEMORY = re.compile(
    r"out of memory|can't allocate memory|not enough memory|STATUS_\w*ALLOC\w*_FAILED|MemoryAllocation"
)
"""What torch says on a CPU, the CUDA runtime, and cuBLAS, cuDNN and their like where their workspace does not fit."""
_DEVICE = re.compile(
    r"(CUDA|HIP) (error|driver error|unknown error)|cuda[A-Z]\w*\(\)|(CUDA|HIP)_ERROR_|cuDNN error"
    r"|(CUBLAS|CUDNN|CUSOLVER|CUSPARSE|CUFFT|HIPBLAS)_STATUS_|Triton Error \[|unhandled cuda error|device-side assert"
)
"""Of the CUDA runtime and driver, cuBLAS and its like, Triton, and NCCL where CUDA failed under it."""


class WorkerLost(Exception):
    """A process that a trial needs has ended: no outcome of the trial, which is issued again."""


class DeviceFailed(WorkerLost):
    """A GPU failed under this process: whatever it asks of CUDA from now on fails too, so the process has to end."""


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
    folder.mkdir(parents=True, exist_ok=True)
    told = redact("".join(traceback.format_exception(error)))  # libraries put tokens into their errors
    (folder / FAILURE_FILE).write_text(told, encoding="utf-8")
    if device_failed(error):
        return End(EndKind.LOST, reason)
    return End(EndKind.FAILED, reason, failure=classify(error), signature=signature(error))


def classify(error: Exception) -> FailureKind:
    """Memory, data, or else a bug."""
    if any(_is_memory(each) for each in _with_causes(error)):
        return FailureKind.OUT_OF_MEMORY
    if isinstance(error, BadData):
        return FailureKind.DATA
    return FailureKind.BUG


def device_failed(error: Exception) -> bool:
    """Whether CUDA itself failed, in another way than for memory: illegal access, ECC, launch failure, a lost GPU.

    Such errors stay with the process: every later call fails as well, whoever's trial makes it.
    """
    causes = list(_with_causes(error))
    return not any(_is_memory(each) for each in causes) and any(_is_of_device(each) for each in causes)


def _is_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and _MEMORY.search(str(error)) is not None


def _is_of_device(error: BaseException) -> bool:
    if type(error).__name__ == "AcceleratorError":
        return True
    return isinstance(error, RuntimeError) and _DEVICE.search(str(error)) is not None


def _with_causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__


def signature(error: Exception) -> str:
    """Type and place: equal for one bug, whatever numbers its message carries."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"
    return f"{type(error).__name__} at {place}"


def disk_refused(error: BaseException | None) -> bool:
    """Whether a full, exhausted or read-only disk is behind it."""
    return any(
        (isinstance(each, OSError) and each.errno in _DISK) or any(words in str(each) for words in _DISK_WORDS)
        for each in _with_causes(error)
    )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else "no message"
