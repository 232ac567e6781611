"""Trials that share a process, on a real Ray: each ends as it would alone, whatever its neighbors do."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.execution.slots import Slots
from orchestrator.execution.stop_reasons import SignalHandler, StopKind, StopReason
from orchestrator.execution.workers.attempt_runner import SessionFactory, open_session
from orchestrator.spec.sweep_spec import SweepSpec
from orchestrator.study.study import Study
from orchestrator.study.trial_records import FailureKind, TrialState
from tests.support.fake_session import FakeSession, run_study, trained, write_script
from tests.support.recorders import ListSink, SilentView
from tests.support.small_trials import without_speed
from tests.support.specs import make_spec, real_spec, sweep_folder
from trainer.training_session import TrainingSession

SHARED = Slots(count=4, gpus=0.0, threads=1, trials_per_process=2)
ONE = Slots(count=2, gpus=0.0, threads=1, trials_per_process=2)
LORA = {"r": 4, "dropout": 0.1}
CLUSTER_SLOTS = SHARED
pytestmark = pytest.mark.usefixtures("ray_cluster")


def run(
    root: Path, sweep: SweepSpec, slots: Slots = SHARED, open_session: SessionFactory = FakeSession
) -> tuple[StopReason, Study, ListSink]:
    folder, sink = sweep_folder(root), ListSink()
    study = Study.open(folder) if folder.database.exists() else Study.create(folder, sweep)
    return run_study(study, sink, slots=slots, open_session=open_session), study, sink


def pids(sink: ListSink, count: int) -> list[str]:
    return [sink.tags(str(number))["worker.pid"] for number in range(count)]


@pytest.mark.slow
def test_eight_trials_over_two_processes(tmp_path: Path) -> None:
    write_script(tmp_path)
    stop, study, sink = run(tmp_path, make_spec(8))
    assert stop.kind is StopKind.FINISHED, stop
    assert [r.state for r in study.trials()] == [TrialState.COMPLETE] * 8
    assert all([p.step for p in study.metric_history(n)] == [0, 1, 2, 3, 4] for n in range(8))
    assert len(set(pids(sink, 8))) == 2
    assert max(int(sink.tags(str(n))["worker.trials"]) for n in range(8)) < 8, "both processes took part"


@pytest.mark.slow
def test_each_ends_in_its_own_way_and_no_neighbour_notices(tmp_path: Path) -> None:
    write_script(tmp_path, trials={"0": "bug", "1": "nan", "2": "memory"})
    stop, study, sink = run(tmp_path, make_spec(6), ONE)
    assert stop.kind is StopKind.FINISHED, stop
    records, done = study.trials(), [TrialState.COMPLETE] * 3
    assert [r.state for r in records] == [TrialState.FAILED, TrialState.PRUNED, TrialState.FAILED, *done]
    assert (records[0].failure, records[2].failure) == (FailureKind.BUG, FailureKind.OUT_OF_MEMORY)
    assert "scripted bug in trial 0" in (study.folder.attempt(0, 1) / "failure.txt").read_text()
    assert len(set(pids(sink, 6))) == 1
    assert [event.text for event in study.events() if event.kind == "worker lost"] == []


class Once(SilentView):
    """Does something once, as soon as both trials have trained to their first checkpoints."""

    def __init__(self, act: Callable[[], None]) -> None:
        super().__init__()
        self._act, self._seen = act, set[int]()

    def add_metrics(self, number: int, metrics: Any) -> None:
        before = len(self._seen)
        if metrics[-1].step >= 2:
            self._seen.add(number)
        if before < len(self._seen) == 2:
            self._act()


def test_a_process_that_dies_takes_its_trials_with_it_once(tmp_path: Path) -> None:
    """One death, a loss for each of its two trials: they go on from their checkpoints in the process started anew."""
    write_script(tmp_path, steps=10_000)
    folder, sink = sweep_folder(tmp_path), ListSink()
    study = Study.create(folder, make_spec(3))

    def kill() -> None:
        write_script(tmp_path, steps=max(study.metric_history(n)[-1].step for n in range(2)) + 40)
        os.kill(int(sink.tags("0")["worker.pid"]), signal.SIGKILL)

    stop = run_study(study, sink, Once(kill), slots=ONE)
    assert stop.kind is StopKind.FINISHED, stop
    assert [r.state for r in study.trials()] == [TrialState.COMPLETE] * 3
    assert [r.attempts for r in study.trials()] == [2, 2, 1]
    lost = [event for event in study.events() if event.kind == "worker lost"]
    assert sorted(str(event.trial) for event in lost) == ["0", "1"]
    assert all("the process shared with other trials" in event.text for event in lost)
    for number in range(3):
        assert [p.step for p in study.metric_history(number)] == list(range(study.metric_history(number)[-1].step + 1))
        assert trained(tmp_path).count(f"{number} 1") == 1, "what was saved is not trained again"


@pytest.mark.slow
def test_one_that_kills_its_process_every_time_stops_the_sweep_after_three(tmp_path: Path) -> None:
    write_script(tmp_path, trials={"1": "deadly"})
    stop, study, _ = run(tmp_path, make_spec(2), ONE)
    assert stop.kind is StopKind.WORKERS_LOST
    lost = [event for event in study.events() if event.kind == "worker lost" and str(event.trial) == "1"]
    assert len(lost) == 3


def adapters(rates: tuple[float, ...], steps: int = 6) -> SweepSpec:
    sweep = real_spec(steps=steps, rates=rates)
    return sweep.model_copy(update={"base": sweep.base.model_validate(sweep.base.model_dump() | {"lora": LORA})})


def assert_each_as_alone(study: Study, cache: Path, root: Path) -> None:
    """To the bit: every metric of every update, and the weights that are saved."""
    for record in study.trials():
        assert record.state is TrialState.COMPLETE, record
        config, folder = study.spec.search.apply(study.spec.base, record.params), root / str(record.number)
        metrics = list(TrainingSession(cache).train(config, folder))
        assert without_speed(study.metric_history(record.number)) == without_speed(metrics)
        saved = study.folder.attempt(record.number, record.attempts) / "model" / "adapter_model.safetensors"
        assert saved.read_bytes() == (folder / "model" / "adapter_model.safetensors").read_bytes()


def test_real_trials_in_one_process_are_what_each_is_alone(tmp_path: Path) -> None:
    sweep = adapters((1e-3, 2e-3, 3e-3)).model_copy(update={"keep_models": 3})
    stop, study, sink = run(tmp_path / "runs", sweep, ONE, open_session=open_session)
    assert stop.kind is StopKind.FINISHED, stop
    assert len(set(pids(sink, 3))) == 1
    assert sink.tags("2")["worker.model_loaded"] == sink.tags("2")["worker.data_loaded"] == "1"
    assert_each_as_alone(study, tmp_path / "cache", tmp_path / "alone")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["killed", "interrupted"])
def test_real_trials_go_on_from_their_checkpoints(tmp_path: Path, how: str) -> None:
    root = tmp_path / "runs"
    study, sink = Study.create(sweep_folder(root), adapters((1e-3, 2e-3), steps=100)), ListSink()
    signals = SignalHandler(lambda: "")

    def act() -> None:
        if how == "killed":
            os.kill(int(sink.tags("0")["worker.pid"]), signal.SIGKILL)
        else:
            signals.received = True

    stop = run_study(study, sink, Once(act), signals, ONE, open_session)
    if how == "interrupted":
        assert stop.kind is StopKind.INTERRUPTED
        assert [r.state for r in study.trials()] == [TrialState.RUNNING] * 2
        study.dispose()
        stop, study, _ = run(root, study.spec, ONE, open_session=open_session)
    assert stop.kind is StopKind.FINISHED, stop
    assert [r.attempts for r in study.trials()] == [2, 2]
    assert_each_as_alone(study, tmp_path / "cache", tmp_path / "alone")
