"""A GPU that fails under a process takes that process with it: no trial fails for it, and no other trial gets it."""

import math
import os
import select
from pathlib import Path

import pytest
import torch

from orchestrator.execution.messages import (
    AttemptReport,
    AttemptResult,
    AttemptStatus,
    DeviceFailed,
    RemoteFailure,
    WorkerLost,
    classify,
    device_failed,
    result_of_exception,
)
from orchestrator.execution.slots import Slots
from orchestrator.execution.stop_reasons import StopKind
from orchestrator.execution.workers import shared_worker as host_module
from orchestrator.execution.workers.multi_process_trial import MultiProcessSession
from orchestrator.execution.workers.shared_worker import SharedWorker
from orchestrator.execution.workers.trial_worker import with_retire_flag
from orchestrator.study.study import Study
from orchestrator.study.trial_records import FailureKind, TrialState
from tests.support.fake_session import FakeSession, make_task, run_study, trained, write_script
from tests.support.processes import LIMIT_SECONDS
from tests.support.recorders import ListSink
from tests.support.specs import make_spec, sweep_folder

ONE = Slots(count=1, gpus=0.0, threads=1)
CLUSTER_SLOTS = SHARED = Slots(count=2, gpus=0.0, threads=1, trials_per_process=2)
BROKEN = [
    "CUDA error: an illegal memory access was encountered",
    "CUDA error: uncorrectable ECC error encountered",
    "CUDA error: unspecified launch failure",
    "CUDA error: device-side assert triggered",
    "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx(handle, ...)`",
    "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED",
    "CUDA driver error: an illegal memory access was encountered",
    "Triton Error [CUDA]: an illegal memory access was encountered",
    "Unexpected error from cudaGetDeviceCount(). Did you run some cuda functions before calling NumCudaDevices()",
    "CUDA unknown error - this may be due to an incorrectly set up environment",
    "NCCL error in: ../NCCLUtils.hpp:268, unhandled cuda error (run with NCCL_DEBUG=INFO for details)",
    "CUDA kernel failed : misaligned address",
    "CUDA Error: an illegal memory access was encountered",
]
FULL = [
    "CUDA error: out of memory",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`",
    "Triton Error [CUDA]: out of memory",
]


@pytest.mark.parametrize("kind", [RuntimeError, torch.AcceleratorError])
@pytest.mark.parametrize("words", BROKEN)
def test_any_cuda_error_but_out_of_memory_loses_the_process(
    kind: type[RuntimeError], words: str, tmp_path: Path
) -> None:
    error = kind(words)
    assert device_failed(error)
    assert result_of_exception(error, tmp_path).status is AttemptStatus.LOST
    assert words in (tmp_path / "failure.txt").read_text(), "the traceback is kept"


@pytest.mark.parametrize("words", FULL)
def test_memory_that_cuda_or_its_libraries_do_not_get_is_out_of_memory(words: str, tmp_path: Path) -> None:
    error = RuntimeError(words)
    assert not device_failed(error)
    assert classify(error) is FailureKind.OUT_OF_MEMORY
    assert result_of_exception(error, tmp_path).failure is FailureKind.OUT_OF_MEMORY
    wrapped = ValueError("while generating")
    wrapped.__cause__ = torch.OutOfMemoryError(words)
    assert classify(wrapped) is FailureKind.OUT_OF_MEMORY


def test_what_a_cuda_error_caused_or_was_handled_by_loses_the_process_too() -> None:
    wrapped = ValueError("the model cannot be evaluated")
    wrapped.__cause__ = torch.AcceleratorError(BROKEN[0])
    assert device_failed(wrapped)
    later = ValueError("while saving")
    later.__context__ = RuntimeError("CUDA error: unspecified launch failure")
    assert device_failed(later)
    later.__suppress_context__ = True
    assert not device_failed(later)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("CUDA error: is what the user wrote"),
        RuntimeError("Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!"),
        RuntimeError("FlashAttention only supports Ampere GPUs or newer."),
    ],
)
def test_what_only_speaks_of_cuda_is_a_bug(error: Exception) -> None:
    assert not device_failed(error)
    assert classify(error) is FailureKind.BUG


@pytest.mark.parametrize(
    ("end", "on_gpu", "goes"),
    [
        (AttemptResult(AttemptStatus.FAILED, "", failure=FailureKind.BUG), True, True),
        (AttemptResult(AttemptStatus.FAILED, "", failure=FailureKind.OUT_OF_MEMORY), True, True),
        (AttemptResult(AttemptStatus.FAILED, "", failure=FailureKind.DATA), True, False),
        (AttemptResult(AttemptStatus.FAILED, "", failure=FailureKind.BUG), False, False),
        (AttemptResult(AttemptStatus.FINISHED, ""), True, False),
        (AttemptResult(AttemptStatus.DIVERGED, ""), True, False),
        (None, True, False),
    ],
)
def test_a_process_that_uses_a_gpu_is_retired_after_a_failure_that_is_not_the_users(
    end: AttemptResult | None, on_gpu: bool, goes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: on_gpu)
    assert with_retire_flag(AttemptReport([], end, 1)).retire is goes


def test_of_several_processes_the_one_whose_gpu_failed_is_the_cause(tmp_path: Path) -> None:
    ranks = MultiProcessSession(tmp_path, FakeSession, 2, {"CPU": 1.0})
    lost = AttemptResult(AttemptStatus.LOST, "AcceleratorError: CUDA error: unspecified launch failure")
    other = AttemptResult(
        AttemptStatus.FAILED, "DistBackendError: NCCL error: remote process exited", failure=FailureKind.BUG
    )
    reason = ranks._failure({0: other, 1: lost}, tmp_path)  # pyright: ignore[reportPrivateUsage]
    assert isinstance(reason, WorkerLost)
    assert str(reason) == f"process 2 of 2 is unusable: {lost.reason}"
    assert isinstance(ranks._failure({0: other}, tmp_path), RemoteFailure)  # pyright: ignore[reportPrivateUsage]


def test_in_a_shared_process_no_neighbour_computes_after_a_gpu_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.execution.workers.attempt_runner.REPORT_SECONDS", math.inf)
    write_script(tmp_path, trials={"0": "device"})
    jobs = [make_task(tmp_path, n) for n in range(2)]
    host = SharedWorker(tmp_path / "cache", FakeSession)
    for task in jobs:
        host.start(task)
    assert [host.next_report("0-1").metrics[-1].step for _ in range(2)] == [0, 2], "until an evaluation each"
    host.next_report("1-1")
    done = trained(tmp_path)
    with pytest.raises(DeviceFailed, match="illegal memory access"):
        host.next_report("0-1")
    with pytest.raises(DeviceFailed, match="shared with other trials: RuntimeError: CUDA error: an illegal"):
        host.next_report("1-1")
    assert [line for line in trained(tmp_path)[len(done) :] if line[0] == "1"] == []
    ended: list[int] = []

    def leave(code: int) -> None:
        ended.append(code)
        raise SystemExit

    monkeypatch.setattr(host_module.os, "_exit", leave)
    for act in (lambda: host.close("0-1"), lambda: host.start(jobs[1])):
        with pytest.raises(SystemExit):
            act()
    assert ended == [1, 1]


def run(root: Path, slots: Slots, trials: int = 3) -> tuple[StopKind, Study, list[tuple[str, str]]]:
    """How it ended, and which process each trial was in, in order."""
    sink = ListSink()
    study = Study.create(sweep_folder(root), make_spec(trials), slots=slots.count)
    stop = run_study(study, sink, slots=slots)
    return stop.kind, study, [(run, tags["worker.pid"]) for _, run, tags in sink.of("tag") if "worker.pid" in tags]


def ended(pid: str) -> bool:
    """Whether this process has ended; one that is ending is waited for."""
    try:
        process = os.pidfd_open(int(pid))
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([process], [], [], LIMIT_SECONDS)[0])
    finally:
        os.close(process)


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("slots", [ONE, SHARED])
def test_a_failed_gpu_costs_one_process_and_no_trial(tmp_path: Path, slots: Slots) -> None:
    write_script(tmp_path, trials={"0": "device"}, until={"1": "failed-0"}, gpu=True)
    kind, study, paths = run(tmp_path, slots)
    assert kind is StopKind.FINISHED
    assert [r.state for r in study.trials()] == [TrialState.COMPLETE] * 3
    lost = [(e.trial, e.text) for e in study.events() if e.kind == "worker lost"]
    assert 0 in [trial for trial, _ in lost]
    assert all("CUDA error: an illegal memory access" in text or "anew" in text or "ended" in text for _, text in lost)
    assert "CUDA error: an illegal memory access" in next(text for trial, text in lost if trial == 0), "the cause stays"
    broken, again = [pid for run, pid in paths if run == "0"]
    assert ended(broken)
    assert again != broken
    assert ("2", broken) not in paths, "the next trial is in another process"
    for number in range(3):
        assert [p.step for p in study.metric_history(number)] == [0, 1, 2, 3, 4]


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("slots", [ONE, SHARED])
def test_after_a_bug_only_a_process_without_a_gpu_gets_the_next_trial(tmp_path: Path, slots: Slots, gpu: bool) -> None:
    neighbour = slots.trials_per_process > 1  # trial 1 was in that process already, and ends in it
    both = {"0": "began-1", "1": "failed-0"} if neighbour else {}
    write_script(tmp_path, trials={"0": "bug"}, until=both, gpu=gpu)
    ended, study, paths = run(tmp_path, slots, trials=4)
    assert ended is StopKind.FINISHED
    assert [r.state for r in study.trials()] == [TrialState.FAILED] + [TrialState.COMPLETE] * 3
    assert not any(e.kind == "worker lost" for e in study.events()), "nobody's trial suffers from it"
    where = dict(paths)
    assert (where["1"] == where["0"]) is (neighbour or not gpu)
    assert (where["2"] == where["0"]) is not gpu
