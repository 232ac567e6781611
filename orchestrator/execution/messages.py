"""Messages between driver and workers: `AttemptTask`, `AttemptReport`, `AttemptResult`. Plain values: no Ray, no torch.

Exceptions of a trial are converted to data: kind, message, and the traceback as a file in the attempt's folder.
"""

from __future__ import annotations

import errno
import re
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from orchestrator.errors import first_line
from orchestrator.folders import FAILURE_FILE
from orchestrator.redaction import redact
from orchestrator.study.trial_records import FailureKind
from trainer.data.data_findings import BadData
from trainer.memory_limits import is_out_of_memory
from trainer.results import StepMetrics

RELEASE_REQUEST_FILE = "stop-asked"
"""Release request: a file in an attempt's folder by which the driver asks the worker to checkpoint and give the trial
back."""

DISCARD_REQUEST_FILE = "discard-asked"
"""File beside a release request: the trial's outcome is decided, so that no checkpoint is needed."""

WORKER_FILE = "worker"
"""File in an attempt's folder with the worker's `process_identity.process_id()`."""

REPORT_KEY = "report"
"""Key of the `AttemptReport` in Ray Tune's result."""

MIRROR_EVENT = "mirror"
"""Kind of the events about failed uploads."""


@dataclass(frozen=True, slots=True)
class AttemptTask:
    """One attempt at a trial, sent to a worker.

    `run_name`: the trial's number as text, or "sft"; `config`: TrialConfig as JSON; `earlier_attempts`: folders of
    earlier attempts.
    """

    run_name: str
    attempt: int
    config: str
    folder: Path
    earlier_attempts: tuple[Path, ...] = ()
    fork_folder: Path | None = None
    """Folder with another trial's checkpoint from which a clone starts."""
    mirror: str | None = None
    """URL of the trial's folder in the sweep's mirror."""
    first_attempt: int = 1
    """Attempts before it failed and are not continued."""

    @property
    def id(self) -> str:
        """Stable id, unique per attempt."""
        return f"{self.run_name}-{self.attempt}"

    @property
    def lock(self) -> Path:
        """Lock file of the process that trains this trial, as an older attempt's process may still be alive."""
        return self.folder.parent / "worker.lock"

    def request_release(self, *, checkpoint: bool = True) -> None:
        """Write a release request: ask the worker to checkpoint, if `checkpoint`, and give the trial back."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not checkpoint:
            (self.folder / DISCARD_REQUEST_FILE).touch()
        (self.folder / RELEASE_REQUEST_FILE).touch()

    @property
    def release_requested(self) -> bool:
        """Whether the driver wrote a release request."""
        return (self.folder / RELEASE_REQUEST_FILE).exists()

    @property
    def wants_checkpoint(self) -> bool:
        """Whether a released trial continues later and therefore needs a checkpoint."""
        return not (self.folder / DISCARD_REQUEST_FILE).exists()


class AttemptStatus(StrEnum):
    """How an attempt ended. After RELEASED, NO_DISK and LOST the trial has no outcome and is issued again."""

    FINISHED = "finished"
    DIVERGED = "diverged"
    FAILED = "failed"
    RELEASED = "released"
    NO_DISK = "no disk"
    LOST = "lost"
    """The process is unusable, for example after a GPU failure; handled as a lost worker."""


@dataclass(frozen=True, slots=True)
class AttemptResult:
    """End of an attempt. `updates`: number of updates done; `bug_signature`: equal for repetitions of one bug."""

    status: AttemptStatus
    reason: str
    updates: int = 0
    failure: FailureKind | None = None
    bug_signature: str = ""


@dataclass(frozen=True, slots=True)
class AttemptReport:
    """Metrics in order of steps, and the result at the end. `counters`: what worker process `pid` has loaded so far."""

    metrics: Sequence[StepMetrics]
    result: AttemptResult | None
    pid: int
    counters: Mapping[str, int] = field(default_factory=dict[str, int])
    notices: Sequence[str] = ()
    """Messages about the mirror."""
    warnings: Sequence[str] = ()
    """Warnings of the trainer."""
    retire: bool = False
    """Whether the worker process must get no other trial, since it used a GPU when this one failed."""


_DISK_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}
_DISK_FULL_PHRASES = ("No space left on device", "StorageFull", "Disk quota exceeded")
_GPU_ERROR = re.compile(
    r"(CUDA|HIP) (error|driver error|unknown error)|cuda[A-Z]\w*\(\)|(CUDA|HIP)_ERROR_|cuDNN error"
    r"|(CUBLAS|CUDNN|CUSOLVER|CUSPARSE|CUFFT|HIPBLAS)_STATUS_|Triton Error \[|unhandled cuda error|device-side assert"
    r"|CUDA (Error|kernel failed)|illegal memory access|misaligned address|unspecified launch failure"
)
"""Error messages of the CUDA runtime and driver, cuBLAS and similar libraries, Triton, NCCL and custom kernels."""


class WorkerLost(Exception):
    """A process of a trial has ended; the trial is issued again."""


class DeviceFailed(WorkerLost):
    """A GPU failed in this process, which must end, as all later CUDA calls fail too."""


class RemoteFailure(Exception):
    """An exception in another process, already converted to a result."""

    def __init__(self, result: AttemptResult) -> None:
        super().__init__(result.reason)
        self.result = result


def result_of_exception(error: Exception, folder: Path) -> AttemptResult:
    """Convert an exception of a trial to a result; the traceback is written to `folder/failure.txt`."""
    if isinstance(error, RemoteFailure):
        return error.result
    reason = redact(f"{type(error).__name__}: {first_line(error)}")
    if is_disk_error(error):
        return AttemptResult(AttemptStatus.NO_DISK, reason)
    folder.mkdir(parents=True, exist_ok=True)
    traceback_text = redact("".join(traceback.format_exception(error)))  # messages of libraries may contain tokens
    (folder / FAILURE_FILE).write_text(traceback_text, encoding="utf-8")
    if device_failed(error):
        return AttemptResult(AttemptStatus.LOST, reason)
    return AttemptResult(AttemptStatus.FAILED, reason, failure=classify(error), bug_signature=bug_signature(error))


def classify(error: Exception) -> FailureKind:
    """Return the kind of failure: out of memory, data, or else a bug."""
    if any(is_out_of_memory(each) for each in _with_causes(error)):
        return FailureKind.OUT_OF_MEMORY
    if isinstance(error, BadData):
        return FailureKind.DATA
    return FailureKind.BUG


def device_failed(error: Exception) -> bool:
    """Return whether CUDA failed other than out of memory: illegal access, ECC error, launch failure, lost GPU.

    After such an error every later CUDA call of the process fails, also for other trials.
    """
    causes = list(_with_causes(error, include_context=True))  # includes errors that were replaced while unwinding
    return not any(is_out_of_memory(each) for each in causes) and any(_is_gpu_error(each) for each in causes)


def _is_gpu_error(error: BaseException) -> bool:
    if type(error).__name__ == "AcceleratorError":
        return True
    return isinstance(error, RuntimeError) and _GPU_ERROR.search(str(error)) is not None


def _with_causes(error: BaseException | None, *, include_context: bool = False) -> Iterator[BaseException]:
    """Yield the error and its `__cause__` chain; `include_context`: also `__context__`."""
    while error is not None:
        yield error
        handled = error.__context__ if include_context and not error.__suppress_context__ else None
        error = error.__cause__ or handled


def bug_signature(error: Exception) -> str:
    """Return exception type and source line, which are equal for repetitions of one bug."""
    frames = traceback.extract_tb(error.__traceback__)
    location = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"
    return f"{type(error).__name__} at {location}"


def is_disk_error(error: BaseException | None) -> bool:
    """Return whether a full or read-only disk, or an exceeded quota, caused the error."""
    return any(
        (isinstance(each, OSError) and each.errno in _DISK_ERRNOS)
        or any(words in str(each) for words in _DISK_FULL_PHRASES)
        for each in _with_causes(error)
    )
