"""Scripted trials on a real Ray: what ends how, and that nothing is lost or doubled."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.exceptions import RayError

from orchestrator.driver.sweep_driver import drive
from orchestrator.errors import DataError
from orchestrator.execution import slots as slots_module
from orchestrator.execution import tune_adapter
from orchestrator.execution.messages import RELEASE_REQUEST_FILE
from orchestrator.execution.slots import Slots
from orchestrator.execution.stop_reasons import SignalHandler, StopKind
from orchestrator.execution.workers.trial_worker import PrestartedWorkers
from orchestrator.study.study import Study
from orchestrator.study.trial_records import FailureKind, TrialState
from tests.support.fake_session import SLOTS, FakeSession, run_study, trained, write_script
from tests.support.processes import wait_until
from tests.support.real_trials import is_alive
from tests.support.recorders import ListSink, SilentView
from tests.support.specs import make_spec, sweep_folder


class Ran:
    def __init__(self, root: Path, count: int = 6, interrupt_at: int | None = None, **script: Any) -> None:
        write_script(root, **script)
        folder = sweep_folder(root)
        self.folder, self.sink = folder, ListSink()
        self.study = Study.open(folder) if folder.database.exists() else Study.create(folder, make_spec(count))
        signals = SignalHandler(lambda: "")
        closed: list[int] = []

        def on_trial_end(record: Any) -> None:
            closed.append(record.number)
            if interrupt_at is not None and len(closed) == interrupt_at:
                signals.received = True

        self.stop = run_study(self.study, self.sink, signals=signals, on_trial_end=on_trial_end)
        self.records = self.study.trials()
        self.states = [r.state for r in self.records]

    def steps(self, number: int) -> list[int]:
        return [p.step for p in self.study.metric_history(number)]


def test_six_trials_over_two_slots_load_once_per_worker(tmp_path: Path, ray_cluster: None) -> None:
    ran = Ran(tmp_path)
    assert ran.stop.kind is StopKind.FINISHED
    assert ran.states == [TrialState.COMPLETE] * 6
    assert all(ran.steps(n) == [0, 1, 2, 3, 4] for n in range(6))
    tags = [ran.sink.tags(str(n)) for n in range(6)]
    assert len({t["worker.pid"] for t in tags}) <= 2
    assert {t["worker.imports"] for t in tags} == {"1"}
    most = {t["worker.pid"]: 0 for t in tags}
    for t in tags:
        most[t["worker.pid"]] = max(most[t["worker.pid"]], int(t["worker.trials"]))
    assert sum(most.values()) == 6, "every trial ran in one of two warm workers"
    assert (sum(e.kind == "worker" for e in ran.study.events()), ran.study.best().number) == (6, 5)
    assert (ran.folder.attempt(0, 1) / "trial.yaml").is_file()


def test_tune_looks_at_no_trial_that_has_ended(
    tmp_path: Path, ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored: list[int] = []
    choose = tune_adapter.ControllerScheduler.choose_trial_to_run

    def counting(self: tune_adapter.ControllerScheduler, tune_controller: Any) -> Any:
        chosen = choose(self, tune_controller)
        stored.append(len(tune_controller.get_trials()))
        return chosen

    monkeypatch.setattr(tune_adapter.ControllerScheduler, "choose_trial_to_run", counting)
    assert Ran(tmp_path, count=8).states == [TrialState.COMPLETE] * 8
    assert max(stored) <= SLOTS.count + 1, "those that run and the one that comes next"


def test_ends_of_every_kind_are_recorded_and_the_sweep_goes_on(tmp_path: Path, ray_cluster: None) -> None:
    ran = Ran(tmp_path, trials={"0": "bug", "1": "memory", "2": "nan", "3": "nogoal", "4": "die"})
    assert ran.stop.kind is StopKind.FINISHED
    assert [s.value for s in ran.states] == ["FAILED", "FAILED", "PRUNED", "FAILED", "COMPLETE", "COMPLETE"]
    assert [r.failure for r in ran.records[:2]] == [FailureKind.BUG, FailureKind.OUT_OF_MEMORY]
    assert "scripted bug in trial 0" in ran.records[0].reason
    assert "Traceback" in (ran.folder.attempt(0, 1) / "failure.txt").read_text()
    assert ran.records[2].diverged
    assert "eval_accuracies/logp" in ran.records[3].reason
    assert (ran.records[4].attempts, ran.steps(4)) == (2, [0, 1, 2, 3, 4])
    assert ran.sink.tags("4")["attempt"] == "2"
    assert trained(tmp_path).count("4 1") == 1, "the second attempt went on from the checkpoint"
    assert ran.sink.tags("3")["state"] == "FAILED"


def test_the_same_bug_three_times_in_a_row_stops_the_sweep(tmp_path: Path, ray_cluster: None) -> None:
    ran = Ran(tmp_path, trials={str(n): "bug" for n in range(6)})
    assert ran.stop.kind is StopKind.SAME_BUG
    assert "scripted bug" in ran.stop.text
    assert ran.states.count(TrialState.FAILED) in (3, 4)
    assert len(ran.records) <= 4


def test_the_same_bug_with_good_trials_between_is_not_in_a_row(tmp_path: Path, ray_cluster: None) -> None:
    ran = Ran(tmp_path, 9, trials={"0": "bug", "4": "bug", "8": "bug"})
    assert ran.stop.kind is StopKind.FINISHED
    assert (ran.states.count(TrialState.FAILED), ran.states.count(TrialState.COMPLETE)) == (3, 6)


def test_a_trial_that_kills_every_worker_ends_the_sweep_resumably(tmp_path: Path, ray_cluster: None) -> None:
    ran = Ran(tmp_path, 2, trials={"0": "deadly"})
    assert ran.stop.kind is StopKind.WORKERS_LOST
    assert "trial 0" in ran.stop.text
    assert ran.states[0] is TrialState.RUNNING
    again = Ran(tmp_path)
    assert (again.states, again.steps(0)) == ([TrialState.COMPLETE] * 2, [0, 1, 2, 3, 4])


def test_interrupted_and_continued(tmp_path: Path, ray_cluster: None) -> None:
    first = Ran(tmp_path, interrupt_at=2, steps=20, hold={"1": 10})
    assert first.stop.kind is StopKind.INTERRUPTED
    running = [r.number for r in first.records if r.state is TrialState.RUNNING]
    assert 1 in running
    assert all((first.folder.attempt(n, 1) / RELEASE_REQUEST_FILE).exists() for n in running)
    second = Ran(tmp_path, steps=20)
    assert second.states == [TrialState.COMPLETE] * 6
    assert all(second.steps(n) == list(range(21)) for n in range(6))
    assert len(trained(tmp_path)) == len(set(trained(tmp_path))), (
        "no step was trained twice: the interrupted trials had checkpointed"
    )


def test_a_request_stops_one_trial_or_all(tmp_path: Path, ray_cluster: None) -> None:
    study = Study.create(sweep_folder(tmp_path), make_spec(6))
    write_script(tmp_path, steps=100_000)  # no end but those that are asked for
    requested: list[int] = []

    class Asking(SilentView):
        def add_metrics(self, number: int, metrics: Any) -> None:
            if not requested:
                requested.append(study.add_request("stop", "enough of this one", trial=number))
            elif len(requested) == 1 and any(r.state is TrialState.PRUNED for r in self.records):
                requested.append(study.add_request("stop", "enough"))

    stop = run_study(study, view=Asking())
    assert stop.kind is StopKind.STOPPED
    assert stop.text == "enough"
    pruned = [r for r in study.trials() if r.state is TrialState.PRUNED]
    assert ([r.reason for r in pruned], study.requests()) == (["by request: enough of this one"], [])


class Opening(FakeSession):
    """Writes its process's id when it is opened; the first one fails where there is a file `broken`."""

    def __init__(self, cache: Path) -> None:
        super().__init__(cache)
        try:
            (cache.parent / "broken").unlink()
        except FileNotFoundError:
            with (cache.parent / "opened").open("a") as opened:
                opened.write(f"{os.getpid()}\n")
        else:
            raise RuntimeError("this process cannot open its session")


def opened(root: Path) -> list[str]:
    return (root / "opened").read_text().splitlines() if (root / "opened").exists() else []


def test_trials_take_the_processes_that_were_started_before_them(tmp_path: Path, ray_cluster: None) -> None:
    study = Study.create(sweep_folder(tmp_path), make_spec(6))
    write_script(tmp_path)
    sink = ListSink()
    with PrestartedWorkers(SLOTS, study.folder.cache, Opening) as prestarted:
        assert prestarted.start(6) == SLOTS.count
        wait_until(lambda: len(opened(study.folder.cache.parent)) == SLOTS.count)
        stop = run_study(study, sink, open_session=Opening, prestarted=prestarted)
    assert (stop.kind, [r.state for r in study.trials()]) == (StopKind.FINISHED, [TrialState.COMPLETE] * 6)
    assert {sink.tags(str(n))["worker.pid"] for n in range(6)} == set(opened(study.folder.cache.parent))
    assert len(opened(study.folder.cache.parent)) == SLOTS.count, "no other process was started"


def test_a_process_that_cannot_open_its_session_gets_no_trial(tmp_path: Path, ray_cluster: None) -> None:
    study = Study.create(sweep_folder(tmp_path), make_spec(2))
    write_script(tmp_path)
    root = study.folder.cache.parent
    root.mkdir(parents=True, exist_ok=True)
    (root / "broken").touch()
    with PrestartedWorkers(SLOTS, study.folder.cache, Opening) as prestarted:
        prestarted.start(1)
        ((_, ready),) = prestarted._workers  # pyright: ignore[reportPrivateUsage]
        with pytest.raises(RayError, match="cannot open its session"):
            ray.get(ready)
        run_study(study, open_session=Opening, prestarted=prestarted)
    assert [(r.state, r.attempts) for r in study.trials()] == [(TrialState.COMPLETE, 1)] * 2


def test_worker_processes_exist_before_the_data_stage_ends_and_end_with_it(tmp_path: Path, ray_cluster: None) -> None:
    folder = sweep_folder(tmp_path)
    folder.path.mkdir(parents=True)

    class SlowData:
        def prepare(self, _: object) -> str:
            wait_until(lambda: len(opened(folder.cache.parent)) == SLOTS.count)
            raise DataError("refused after that")

    with pytest.raises(DataError, match="refused after that"):
        drive(folder, make_spec(6), SLOTS, SilentView(), SignalHandler(lambda: ""), Opening, SlowData(), None)  # pyright: ignore
    wait_until(lambda: not any(is_alive(int(pid)) for pid in opened(folder.cache.parent)))


@pytest.mark.parametrize(
    "slots",
    [
        replace(SLOTS, gpus=1.0),
        replace(SLOTS, cpus=1.0),
        replace(SLOTS, processes=2),
        replace(SLOTS, trials_per_process=2),
    ],
)
def test_processes_whose_resources_ray_gives_at_their_start_start_with_their_trial(
    tmp_path: Path, ray_cluster: None, slots: Slots
) -> None:
    assert PrestartedWorkers(slots, tmp_path, Opening).start(2) == 0


def test_no_process_is_started_early_without_memory_for_it(
    tmp_path: Path, ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slots_module, "available_memory", lambda: 2.5 * slots_module.WORKER_BYTES)
    with PrestartedWorkers(SLOTS, tmp_path, Opening) as prestarted:
        assert prestarted.start(2) == 1


@pytest.mark.parametrize(
    ("imported", "unused"),
    [
        (
            "orchestrator.execution.workers.trial_worker, trainer.training_session",
            "peft datasets trl optuna mlflow sklearn",
        ),
        (
            "orchestrator.cli.composition, orchestrator.execution.workers.data_process",
            "ray torch sklearn plotly mlflow",
        ),
        ("orchestrator.execution.workers.data_preparation", "orchestrator.study ray torch transformers datasets trl"),
        ("orchestrator.driver.sweep_driver", "torch sklearn plotly mlflow"),
    ],
)
def test_a_worker_and_the_driver_load_nothing_that_their_beginning_does_not_use(imported: str, unused: str) -> None:
    code = f"import sys, {imported}\nprint(*(name for name in {unused.split()} if name in sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == ""
