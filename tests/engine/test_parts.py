"""What needs no Ray: slots, failures, attempts."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from scripted import BASE, METRIC, ScriptedWorkshop, make_spec, write_script

from orchestrator.errors import SpecError
from orchestrator.execution.local_cluster import plan_slots, worker_environment
from orchestrator.execution.messages import EndKind, Job, WorkerLost, ended_by
from orchestrator.execution.stop_reasons import Stop, StopKind
from orchestrator.execution.user_requests import Wishes
from orchestrator.execution.workers.attempt_runner import Attempt
from orchestrator.folders import SweepFolder
from orchestrator.study.study import Study
from orchestrator.study.trial_records import FailureKind


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
        ({"gpus_per_trial": 1.5}, "more than one GPU is a whole number"),
        ({"gpus_per_trial": 4, "processes_per_trial": 2}, "each process has one GPU"),
        ({"gpus_per_trial": 0.5, "processes_per_trial": 2}, "each process has one GPU"),
    ],
)
def test_resources_that_no_trial_can_have(resources: dict[str, float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make_spec(resources=resources)


def test_trl_trains_in_one_process() -> None:
    wanted = make_spec(resources={"processes_per_trial": 2}, base={**BASE, "engine": "trl"})
    with pytest.raises(SpecError, match="engine trl trains in one"):
        plan_slots(wanted, cpus=8, gpus=0)


def test_a_trial_that_does_not_fit_is_refused() -> None:
    with pytest.raises(SpecError, match="1 GPUs; this machine has 2 CPUs and 0 GPUs"):
        plan_slots(make_spec(resources={"gpus_per_trial": 1}), cpus=2, gpus=0)


def test_a_worker_takes_no_secret_through_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "canary")
    assert "canary" not in str(worker_environment(1))


@pytest.mark.parametrize(
    ("error", "kind", "failure"),
    [
        (MemoryError(), EndKind.FAILED, FailureKind.OUT_OF_MEMORY),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), EndKind.FAILED, FailureKind.OUT_OF_MEMORY),
        (KeyError("x"), EndKind.FAILED, FailureKind.BUG),
        (OSError(errno.ENOSPC, "No space left on device"), EndKind.NO_DISK, None),
        (FileNotFoundError(errno.ENOENT, "gone"), EndKind.FAILED, FailureKind.BUG),
    ],
)
def test_exceptions_as_data(tmp_path: Path, error: Exception, kind: EndKind, failure: FailureKind | None) -> None:
    end = ended_by(error, tmp_path)
    assert (end.kind, end.failure) == (kind, failure)
    assert (tmp_path / "failure.txt").exists() == (kind is EndKind.FAILED)


def _attempt(tmp_path: Path, **script: object) -> tuple[Attempt, Job]:
    write_script(tmp_path, **script)
    job = Job("0", 1, make_spec().base.model_dump_json(), tmp_path / "trials" / "0000" / "1")
    workshop = ScriptedWorkshop(tmp_path / "cache")
    return Attempt(job, lambda: workshop, patience=0.2), job


def test_points_come_back_at_once_after_an_evaluation(tmp_path: Path) -> None:
    attempt, _ = _attempt(tmp_path, steps=4)
    reports = [attempt.pull() for _ in range(4)]
    assert [[p.step for p in r.points] for r in reports] == [[0], [1, 2], [3, 4], []]
    assert METRIC in reports[1].points[-1].metrics
    assert reports[-1].end is not None
    assert reports[-1].end.kind is EndKind.FINISHED


def test_asked_before_it_began_it_loads_nothing(tmp_path: Path) -> None:
    attempt, job = _attempt(tmp_path)
    job.ask_to_stop()
    report = attempt.pull()
    assert report.end is not None
    assert report.end.kind is EndKind.RELEASED
    assert report.counters == {}


def test_two_processes_never_work_on_one_trial(tmp_path: Path) -> None:
    first, _ = _attempt(tmp_path)
    first.pull()
    second, _ = _attempt(tmp_path)
    end = second.pull().end
    assert end is not None
    assert "another process" in end.reason
    first.close()


def test_another_machines_process_is_waited_for_and_is_no_outcome(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = _attempt(tmp_path)
    first.pull()
    lock = next(tmp_path.rglob("worker.lock"))
    lock.write_text("pid 1 on far-away, process another-boot/pid:[1]/7")
    monkeypatch.setattr("orchestrator.execution.workers.attempt_runner._FAR_SECONDS", 0.3)
    second, _ = _attempt(tmp_path)
    with pytest.raises(WorkerLost, match="pid 1 on far-away"):
        second.pull()
    first.close()


def test_wishes_are_heard_once_and_hours_are_told(tmp_path: Path) -> None:
    folder = SweepFolder(tmp_path, "s")
    with Study.create(folder, make_spec()) as study:
        study.begin()
        assert Wishes(study).ask() is None
        study.request("stop", "enough", trial=3)
        study.request("stop", "all of it")
        wishes = Wishes(study)
        assert wishes.ask() == Stop(StopKind.STOPPED, "all of it")
        assert [(r.trial, r.text) for r in wishes.trials] == [(3, "enough")]
        assert list(wishes.trials) == study.requests(), "one about a trial stays until it has had its effect"
    folder = SweepFolder(tmp_path, "short")
    with Study.create(folder, make_spec(name="short", budget={"hours": 1e-9})) as study:
        study.begin()
        stop = Wishes(study).ask()
        assert stop is not None
        assert stop.kind is StopKind.OUT_OF_BUDGET
        assert "--set budget.hours" in stop.text


def test_a_study_elsewhere_is_known_to_exist(tmp_path: Path) -> None:
    folder = SweepFolder(tmp_path, "s")
    assert not Study.exists(folder)
    elsewhere = f"sqlite:///{tmp_path / 'elsewhere.db'}"
    with Study.create(folder, make_spec(storage=elsewhere)):
        assert not folder.database.exists()
    assert Study.exists(folder)
    with Study.open(folder) as study:
        assert study.spec.storage == elsewhere
