"""What needs no Ray: slots, failures, attempts."""

import errno
import math
from itertools import pairwise
from pathlib import Path

import pytest

from orchestrator.errors import SpecError
from orchestrator.execution.local_cluster import worker_environment
from orchestrator.execution.messages import AttemptStatus, AttemptTask, WorkerLost, result_of_exception
from orchestrator.execution.slots import plan_slots
from orchestrator.execution.stop_reasons import StopKind, StopReason
from orchestrator.execution.user_requests import StopConditions, TrialRequests
from orchestrator.execution.workers.attempt_runner import AttemptRunner
from orchestrator.folders import SweepFolder
from orchestrator.study.study import Study
from orchestrator.study.trial_records import FailureKind, TrialState
from tests.support.fake_session import FakeSession, make_task, write_script
from tests.support.recorders import ListSink, SilentView
from tests.support.specs import BASE, METRIC, make_spec


@pytest.mark.parametrize(
    ("resources", "concurrency", "cpus", "gpus", "count"),
    [
        ({}, None, 2, 0, 2),
        ({}, 1, 2, 0, 1),
        ({}, 8, 2, 0, 2),
        ({"cpus_per_trial": 0.5}, None, 2, 0, 4),
        ({"cpus_per_trial": 2}, None, 2, 0, 1),
        ({}, None, 2, 8, 8),
        ({"gpus_per_trial": 0.5}, None, 2, 2, 4),
        ({"gpus_per_trial": 2}, None, 16, 8, 4),
        ({"gpus_per_trial": 0}, None, 3, 8, 3),
        ({"processes_per_trial": 2}, None, 5, 0, 2),
        ({"processes_per_trial": 2}, None, 2, 8, 4),
        ({"processes_per_trial": 2, "cpus_per_trial": 4}, None, 8, 0, 2),
    ],
)
def test_slots(resources: dict[str, float], concurrency: int | None, cpus: int, gpus: int, count: int) -> None:
    spec = make_spec(resources=resources, budget={"concurrency": concurrency})
    assert plan_slots(spec, cpus=cpus, gpus=gpus).count == count


def test_a_trial_on_several_gpus_is_one_bundle_for_its_worker_and_one_for_each_gpu() -> None:
    slots = plan_slots(make_spec(resources={"gpus_per_trial": 2}), cpus=16, gpus=8)
    assert (slots.processes, slots.gpus, slots.strategy) == (2, 2.0, "STRICT_PACK")
    assert [bundle.get("GPU", 0) for bundle in slots.bundles] == [0, 1, 1]
    alone = plan_slots(make_spec(resources={"gpus_per_trial": 0.5}), cpus=16, gpus=8)
    assert (alone.processes, [bundle["GPU"] for bundle in alone.bundles]) == (1, [0.5])


@pytest.mark.parametrize(
    ("resources", "said"),
    [
        ({"gpus_per_trial": 1.5}, "above 1 it must be a whole number"),
        ({"gpus_per_trial": 4, "processes_per_trial": 2}, "each process has one GPU"),
        ({"gpus_per_trial": 0.5, "processes_per_trial": 2}, "each process has one GPU"),
    ],
)
def test_resources_that_no_trial_can_have(resources: dict[str, float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make_spec(resources=resources)


def test_trl_trains_in_one_process() -> None:
    expected = make_spec(resources={"processes_per_trial": 2}, base={**BASE, "engine": "trl"})
    with pytest.raises(SpecError, match="engine trl supports only one"):
        plan_slots(expected, cpus=8, gpus=0)


def test_a_trial_that_does_not_fit_is_refused() -> None:
    with pytest.raises(SpecError, match="a trial needs 1 CPU and 1 GPU; this machine has 2 CPUs and 0 GPUs"):
        plan_slots(make_spec(resources={"gpus_per_trial": 1}), cpus=2, gpus=0)


def test_a_worker_takes_no_secret_through_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "canary")
    assert "canary" not in str(worker_environment(1))


@pytest.mark.parametrize(
    ("error", "kind", "failure"),
    [
        (MemoryError(), AttemptStatus.FAILED, FailureKind.OUT_OF_MEMORY),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), AttemptStatus.FAILED, FailureKind.OUT_OF_MEMORY),
        (KeyError("x"), AttemptStatus.FAILED, FailureKind.BUG),
        (OSError(errno.ENOSPC, "No space left on device"), AttemptStatus.NO_DISK, None),
        (FileNotFoundError(errno.ENOENT, "gone"), AttemptStatus.FAILED, FailureKind.BUG),
    ],
)
def test_exceptions_as_data(tmp_path: Path, error: Exception, kind: AttemptStatus, failure: FailureKind | None) -> None:
    end = result_of_exception(error, tmp_path)
    assert (end.status, end.failure) == (kind, failure)
    assert (tmp_path / "failure.txt").exists() == (kind is AttemptStatus.FAILED)


def _attempt(tmp_path: Path, **script: object) -> tuple[AttemptRunner, AttemptTask]:
    write_script(tmp_path, **script)
    task, session = make_task(tmp_path), FakeSession(tmp_path / "cache")
    return AttemptRunner(task, lambda: session, lock_timeout=0.2), task


def test_points_come_back_at_once_after_an_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.execution.workers.attempt_runner.REPORT_SECONDS", math.inf)
    attempt, _ = _attempt(tmp_path, steps=4)
    reports = [attempt.next_report() for _ in range(4)]
    assert [[p.step for p in r.metrics] for r in reports] == [[0], [1, 2], [3, 4], []]
    assert METRIC in reports[1].metrics[-1].metrics
    assert reports[-1].result.status is AttemptStatus.FINISHED


def test_asked_before_it_began_it_loads_nothing(tmp_path: Path) -> None:
    attempt, task = _attempt(tmp_path)
    task.request_release()
    report = attempt.next_report()
    assert report.result.status is AttemptStatus.RELEASED
    assert report.counters == {}


def test_two_processes_never_work_on_one_trial(tmp_path: Path) -> None:
    first, _ = _attempt(tmp_path)
    first.next_report()
    second, _ = _attempt(tmp_path)
    assert "still trains this trial and was not killed" in second.next_report().result.reason
    first.close()


def test_another_machines_process_is_waited_for_and_is_no_outcome(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = _attempt(tmp_path)
    first.next_report()
    next(tmp_path.rglob("worker.lock")).write_text("pid 1 on far-away, process another-boot/pid:[1]/7")
    monkeypatch.setattr("orchestrator.execution.workers.attempt_runner._REMOTE_LOCK_SECONDS", 0.3)
    second, _ = _attempt(tmp_path)
    with pytest.raises(WorkerLost, match="pid 1 on far-away"):
        second.next_report()
    first.close()


def test_requests_are_handled_once_and_used_hours_are_reported(tmp_path: Path) -> None:
    folder = SweepFolder(tmp_path, "s")
    with Study.create(folder, make_spec()) as study:
        study.start_driving()
        assert StopConditions(study).read_study() is None
        study.add_request("stop", "enough", trial=3)
        study.add_request("stop", "all of it")
        stop_conditions = StopConditions(study)
        assert stop_conditions.read_study() == StopReason(StopKind.STOPPED, "all of it")
        assert [(r.trial, r.text) for r in stop_conditions.trial_requests] == [(3, "enough")]
        assert list(stop_conditions.trial_requests) == study.requests(), (
            "one about a trial stays until it has had its effect"
        )
    folder = SweepFolder(tmp_path, "short")
    with Study.create(folder, make_spec(name="short", budget={"hours": 1e-9})) as study:
        study.start_driving()
        stop = StopConditions(study).read_study()
        assert stop.kind is StopKind.OUT_OF_BUDGET
        assert "--set budget.hours" in stop.text


def test_requests_are_looked_for_several_times_a_second_and_the_budget_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a clock of its own: the driver's loop polls ten times a second."""
    now, looks, checks = [100.0], [], []
    monkeypatch.setattr("orchestrator.execution.user_requests.time.monotonic", lambda: now[0])
    with Study.create(SweepFolder(tmp_path, "s"), make_spec()) as study:
        study.start_driving()
        requests = study.requests
        monkeypatch.setattr(study, "requests", lambda: (looks.append(now[0]), requests())[1])
        stop_conditions = StopConditions(study)
        for _ in range(40):
            now[0] += 0.1
            assert stop_conditions.read_study() is None
            checks += [now[0]] if stop_conditions.has_read else []
    assert max(later - earlier for earlier, later in pairwise(looks)) < 0.35
    assert len(checks) == 4


def test_the_worker_of_a_pruned_trial_is_asked_at_once_and_for_no_checkpoint(tmp_path: Path) -> None:
    task = AttemptTask("0", 1, "{}", tmp_path / "0" / "1")
    assert (task.release_requested, task.wants_checkpoint) == (False, True)
    with Study.create(SweepFolder(tmp_path, "s"), make_spec()) as study:
        study.start_driving()
        assert study.ask() is not None
        study.add_request("prune", "flat", trial=0)
        requests = TrialRequests(study, ListSink(), SilentView(), lambda _: None)
        requests.apply(study.requests(), {0: task})
        assert (task.release_requested, task.wants_checkpoint) == (True, False)
        assert requests.requested_outcome(0).state is TrialState.PRUNED
        assert study.requests(), "it stays until the trial has ended"


def test_a_study_elsewhere_is_known_to_exist(tmp_path: Path) -> None:
    folder = SweepFolder(tmp_path, "s")
    assert not Study.exists(folder)
    elsewhere = f"sqlite:///{tmp_path / 'elsewhere.db'}"
    with Study.create(folder, make_spec(storage=elsewhere)):
        assert not folder.database.exists()
    assert Study.exists(folder)
    with Study.open(folder) as study:
        assert study.spec.storage == elsewhere
