"""Trials of two processes on a real Ray, with the real trainer: as in one process, whatever happens to them."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import pytest

from orchestrator.execution.slots import Slots
from orchestrator.execution.stop_reasons import SignalHandler, StopKind, StopReason
from orchestrator.spec.sweep_spec import SweepSpec
from orchestrator.study.study import Study
from orchestrator.study.trial_records import TrialState
from tests.support.fake_session import run_study
from tests.support.real_trials import MortalSession
from tests.support.recorders import ListSink, SilentView
from tests.support.small_trials import without_speed
from tests.support.specs import real_spec, sweep_folder
from trainer.training_session import TrainingSession

TWO, ONE = Slots(count=1, gpus=0.0, threads=1, processes=2), Slots(count=1, gpus=0.0, threads=1)
CLUSTER_SLOTS = TWO
pytestmark = pytest.mark.usefixtures("ray_cluster")


def run(
    root: Path, sweep: SweepSpec, slots: Slots = TWO, view: SilentView | None = None
) -> tuple[StopReason, Study, ListSink]:
    folder, sink = sweep_folder(root), ListSink()
    study = Study.open(folder) if folder.database.exists() else Study.create(folder, sweep)
    signals = SignalHandler(lambda: "")
    if isinstance(view, Watching):
        view.interrupt, view.study = signals, study
    return run_study(study, sink, view, signals, slots, MortalSession), study, sink


class Watching(SilentView, ABC):
    """Does something at the first point of trial 0 after its start."""

    interrupt: SignalHandler
    study: Study
    done = False

    def add_metrics(self, number: int, metrics: Any) -> None:
        if not self.done and number == 0 and metrics[-1].step > 0:
            self.done = True
            self.act()

    @abstractmethod
    def act(self) -> None: ...


class Interrupting(Watching):
    def act(self) -> None:
        self.interrupt.received = True


class Pruning(Watching):
    def act(self) -> None:
        self.study.add_request("prune", "seen enough", trial=0)


def assert_as_alone(study: Study, number: int, cache: Path, folder: Path) -> None:
    """Against the same trial in this process alone."""
    record = study.trials()[number]
    assert record.state is TrialState.COMPLETE
    config = study.spec.search.apply(study.spec.base, record.params)
    expected = without_speed(list(TrainingSession(cache).train(config, folder)))
    found = without_speed(study.metric_history(number))
    assert [step for step, _ in found] == [step for step, _ in expected]
    for (step, metrics), (_, alone) in zip(found, expected, strict=True):
        assert metrics == pytest.approx(alone, rel=1e-5, abs=1e-6), f"step {step}"


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_trials_in_the_same_two_processes(strategy: str, tmp_path: Path) -> None:
    stop, study, sink = run(tmp_path / "runs", real_spec(strategy, rates=(1e-3, 2e-3)))
    assert stop.kind is StopKind.FINISHED, stop
    assert [r.attempts for r in study.trials()] == [1, 1]
    for number in range(2):
        assert_as_alone(study, number, tmp_path / "cache", tmp_path / str(number))
    assert sink.tags("1")["worker.trials"] == "2", "the processes stayed"
    assert sink.tags("1")["worker.model_loaded"] == ("1" if strategy == "ddp" else "2")
    assert len((tmp_path / "runs/pids").read_text().split()) == 4
    assert len(set((tmp_path / "runs/pids").read_text().split())) == 2


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_process_is_killed_and_the_trial_goes_on_from_its_checkpoint(rank: int, tmp_path: Path) -> None:
    root = tmp_path / "runs"
    root.mkdir()
    (root / "die").write_text(str(rank))
    stop, study, _ = run(root, real_spec("fsdp2"))
    assert stop.kind is StopKind.FINISHED, stop
    assert [r.attempts for r in study.trials()] == [2]
    lost = [event.text for event in study.events() if event.kind == "worker lost"]
    assert len(lost) == 1
    assert f"process {rank + 1} of 2 ended" in lost[0]
    assert [(root / f"left-{n}").read_text() for n in range(2)] == ["", ""], "the other one was ended first"
    assert_as_alone(study, 0, tmp_path / "cache", tmp_path / "alone")


@pytest.mark.slow
def test_a_gpu_that_fails_in_one_process_costs_all_of_them_and_not_the_trial(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    root.mkdir()
    (root / "device").write_text("1")
    stop, study, _ = run(root, real_spec("ddp"))
    assert stop.kind is StopKind.FINISHED, stop
    assert [r.attempts for r in study.trials()] == [2]
    (lost,) = [event.text for event in study.events() if event.kind == "worker lost"]
    assert "process 2 of 2 is unusable: RuntimeError: CUDA error: uncorrectable ECC" in lost
    assert "uncorrectable ECC" in (study.folder.attempt(0, 1) / "failure.txt").read_text()
    assert [(root / f"left-{n}").read_text() for n in range(2)] == ["", ""], "both processes were ended first"
    assert_as_alone(study, 0, tmp_path / "cache", tmp_path / "alone")


@pytest.mark.slow
def test_interrupted_and_continued_in_one_process_and_again_in_two(tmp_path: Path) -> None:
    root, sweep = tmp_path / "runs", real_spec("fsdp2", steps=60)
    for slots in (TWO, ONE):
        stop, study, _ = run(root, sweep, slots, Interrupting())
        assert stop.kind is StopKind.INTERRUPTED
        assert study.trials()[0].state is TrialState.RUNNING
        study.dispose()
    stop, study, _ = run(root, sweep)
    assert stop.kind is StopKind.FINISHED
    assert study.trials()[0].attempts == 3
    assert_as_alone(study, 0, tmp_path / "cache", tmp_path / "alone")


@pytest.mark.slow
def test_a_trial_that_is_ended_leaves_both_processes_ready_for_the_next(tmp_path: Path) -> None:
    stop, study, sink = run(tmp_path / "runs", real_spec("ddp", steps=100, rates=(1e-3, 2e-3)), view=Pruning())
    assert stop.kind is StopKind.FINISHED
    assert [r.state for r in study.trials()] == [TrialState.PRUNED, TrialState.COMPLETE]
    assert (sink.tags("1")["worker.trials"], sink.tags("1")["worker.model_loaded"]) == ("2", "1")


@pytest.mark.slow
def test_what_fails_in_all_of_them_is_told_once(tmp_path: Path) -> None:
    sweep = real_spec("ddp")
    few = sweep.base.training.model_copy(update={"pairs_per_update": 1})
    sweep = sweep.model_copy(update={"base": sweep.base.model_copy(update={"training": few})})
    stop, study, _ = run(tmp_path / "runs", sweep)
    assert stop.kind is StopKind.FINISHED
    record = study.trials()[0]
    assert record.state is TrialState.FAILED
    assert "pairs_per_update: 1 is less than the number of processes; set it to at least 2" in record.reason
    assert "less than the number of processes" in (study.folder.attempt(0, 1) / "failure.txt").read_text()
