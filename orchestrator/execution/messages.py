"""Messages between driver and workers: `AttemptTask`, `AttemptReport`, `AttemptResult`. Plain values: no Ray, no torch.

An exception in a trial becomes data: its kind, its message, its traceback in the attempt's folder.
"""

from __future__ import annotations

import errno
import re
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from orchestrator.folders import FAILURE_FILE
from orchestrator.redaction import redact
from orchestrator.study.trial_records import FailureKind
from trainer.data.validation import BadData
from trainer.results import StepMetrics

STOP_REQUEST_FILE = "stop-asked"
"""In an attempt's folder: the worker checkpoints and hands the trial back."""

WORKER_FILE = "worker"
"""In an attempt's folder: which process has it, as `lease.signature()` tells it."""

REPORT = "report"
"""The key under which Ray Tune's result carries a `AttemptReport`."""

MIRROR = "mirror"
"""The kind of event that tells of copies which failed."""


@dataclass(frozen=True, slots=True)
class AttemptTask:
    """One attempt at a trial. `config` is a TrialConfig as JSON: workers rebuild it, nothing else is shared."""

    run: str
    attempt: int
    config: str
    folder: Path
    earlier: tuple[Path, ...] = ()
    fork: Path | None = None
    """Another trial's checkpoint to go on from, where this one has none of its own yet."""
    mirror: str | None = None
    """URL of the trial's place in the sweep's mirror."""

    @property
    def id(self) -> str:
        """Stable, and different for each attempt."""
        return f"{self.run}-{self.attempt}"

    @property
    def lock(self) -> Path:
        """Held by the process that works on this trial: an older attempt's process may still be dying."""
        return self.folder.parent / "worker.lock"

    def request_stop(self) -> None:
        """Have the worker checkpoint and let go."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / STOP_REQUEST_FILE).touch()

    @property
    def stop_requested(self) -> bool:
        """Whether the driver wants this trial back."""
        return (self.folder / STOP_REQUEST_FILE).exists()


class AttemptStatus(StrEnum):
    """How an attempt ended. RELEASED, NO_DISK and LOST are no outcome of the trial: it will be issued again."""

    FINISHED = "finished"
    DIVERGED = "diverged"
    FAILED = "failed"
    RELEASED = "released"
    NO_DISK = "no disk"
    LOST = "lost"
    """With a process that cannot go on. Drivers hear of it as a worker that is lost."""


@dataclass(frozen=True, slots=True)
class AttemptResult:
    """The end of an attempt. `bug_signature` tells one bug from another."""

    status: AttemptStatus
    reason: str
    steps: int = 0
    failure: FailureKind | None = None
    bug_signature: str = ""


@dataclass(frozen=True, slots=True)
class AttemptReport:
    """Points in order, and the end when it came. `counters` says what the worker `pid` has loaded so far."""

    metrics: Sequence[StepMetrics]
    result: AttemptResult | None
    pid: int
    counters: Mapping[str, int] = field(default_factory=dict[str, int])
    notices: Sequence[str] = ()
    """What people should know of the mirror."""
    warnings: Sequence[str] = ()
    """What the trainer warned of."""
    retire: bool = False
    """Whether the worker process is to get no other trial: it was using a GPU when this one failed."""


_DISK_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}
_DISK_FULL_PHRASES = ("No space left on device", "StorageFull", "Disk quota exceeded")
_MEMORY = re.compile(
    r"out of memory|can't allocate memory|not enough memory|STATUS_\w*ALLOC\w*_FAILED|MemoryAllocation"
)
"""What torch says on a CPU, the CUDA runtime, and cuBLAS, cuDNN and their like where their workspace does not fit."""
_DEVICE = re.compile(
    r"(CUDA|HIP) (error|driver error|unknown error)|cuda[A-Z]\w*\(\)|(CUDA|HIP)_ERROR_|cuDNN error"
    r"|(CUBLAS|CUDNN|CUSOLVER|CUSPARSE|CUFFT|HIPBLAS)_STATUS_|Triton Error \[|unhandled cuda error|device-side assert"
    r"|CUDA (Error|kernel failed)|illegal memory access|misaligned address|unspecified launch failure"
)
"""Of the CUDA runtime and driver, cuBLAS and its like, Triton, NCCL where CUDA failed under it, others' kernels."""


class WorkerLost(Exception):
    """A process that a trial needs has ended: no outcome of the trial, which is issued again."""


class DeviceFailed(WorkerLost):
    """A GPU failed under this process: whatever it asks of CUDA from now on fails too, so the process has to end."""


class RemoteFailure(Exception):
    """An exception in another process, which has made it an end already."""

    def __init__(self, result: AttemptResult) -> None:
        super().__init__(result.reason)
        self.result = result


def result_of_exception(error: Exception, folder: Path) -> AttemptResult:
    """The end that this exception means; its traceback goes to `folder/failure.txt`."""
    if isinstance(error, RemoteFailure):
        return error.result
    reason = redact(f"{type(error).__name__}: {_first_line(error)}")
    if is_disk_error(error):
        return AttemptResult(AttemptStatus.NO_DISK, reason)
    folder.mkdir(parents=True, exist_ok=True)
    traceback_text = redact("".join(traceback.format_exception(error)))  # libraries put tokens into their errors
    (folder / FAILURE_FILE).write_text(traceback_text, encoding="utf-8")
    if device_failed(error):
        return AttemptResult(AttemptStatus.LOST, reason)
    return AttemptResult(AttemptStatus.FAILED, reason, failure=classify(error), bug_signature=bug_signature(error))


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
    causes = list(_with_causes(error, implied=True))  # whatever was raised on the way out, the device stays as it is
    return not any(_is_memory(each) for each in causes) and any(_is_of_device(each) for each in causes)


def _is_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and _MEMORY.search(str(error)) is not None


def _is_of_device(error: BaseException) -> bool:
    if type(error).__name__ == "AcceleratorError":
        return True
    return isinstance(error, RuntimeError) and _DEVICE.search(str(error)) is not None


def _with_causes(error: BaseException | None, *, implied: bool = False) -> Iterator[BaseException]:
    """The error and what it was raised from; `implied`: also what was being handled when it was raised."""
    while error is not None:
        yield error
        handled = error.__context__ if implied and not error.__suppress_context__ else None
        error = error.__cause__ or handled


def bug_signature(error: Exception) -> str:
    """Type and place: equal for one bug, whatever numbers its message carries."""
    frames = traceback.extract_tb(error.__traceback__)
    location = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"
    return f"{type(error).__name__} at {location}"


def is_disk_error(error: BaseException | None) -> bool:
    """Whether a full, exhausted or read-only disk is behind it."""
    return any(
        (isinstance(each, OSError) and each.errno in _DISK_ERRNOS)
        or any(words in str(each) for words in _DISK_FULL_PHRASES)
        for each in _with_causes(error)
    )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else "no message"
