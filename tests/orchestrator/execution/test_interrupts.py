"""An interrupt that comes after its run has ended stops nobody else's run; and waiting for a worker is no GPU time."""

from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import pytest

from orchestrator.execution.local_cluster import local_cluster
from orchestrator.execution.messages import AttemptStatus, AttemptTask
from orchestrator.execution.slots import Slots
from orchestrator.execution.stop_reasons import SignalHandler, StopKind
from orchestrator.execution.workers import rank_actor as rank_module
from orchestrator.execution.workers.attempt_runner import AttemptRunner
from orchestrator.execution.workers.multi_process_trial import MultiProcessSession
from orchestrator.execution.workers.rank_actor import RankActor, RankStep
from orchestrator.execution.workers.shared_worker import SharedWorker
from orchestrator.study.study import Study
from tests.support.fake_session import FakeSession, make_task, run_study, write_script
from tests.support.recorders import SilentView
from tests.support.small_trials import finish
from tests.support.specs import make_spec, real_spec, sweep_folder
from trainer.config.trial import TrialConfig
from trainer.results import RunResult, StepMetrics
from trainer.results import RunStatus as TrainerEnd
from trainer.training_session import TrainingSession

CONFIG = real_spec(steps=2).base


def status_of(run: Generator[StepMetrics, None, RunResult]) -> TrainerEnd:
    return finish(run)[1].status


def test_the_trainers_next_run_knows_nothing_of_an_interrupt_that_came_late(tmp_path: Path) -> None:
    session = TrainingSession(tmp_path / "cache")
    assert status_of(session.train(CONFIG, tmp_path / "0")) is TrainerEnd.FINISHED
    session.interrupt()
    assert status_of(session.train(CONFIG, tmp_path / "1")) is TrainerEnd.FINISHED
    run = session.train(CONFIG, tmp_path / "2")
    session.interrupt()  # before anything was computed: this run's
    assert status_of(run) is TrainerEnd.STOPPED
    assert status_of(session.train(CONFIG, tmp_path / "2")) is TrainerEnd.FINISHED


class Counting:
    """Trains nothing; counts interrupts."""

    def __init__(self) -> None:
        self.counters: dict[str, int] = {}
        self.interrupts = 0

    def interrupt(self, *, checkpoint: bool = True) -> None:
        self.interrupts += 1

    def train(
        self, config: TrialConfig, folder: Path, earlier_attempts: Sequence[Path] = (), fork_folder: Path | None = None
    ) -> Generator[StepMetrics, None, RunResult]:
        yield StepMetrics(0, {"eval_loss": 1.0})
        return RunResult(TrainerEnd.FINISHED, "", 0)


class Wakes:
    """The event of an attempt's end, at which the attempt ends just after its watch has looked."""

    def __init__(self, then: Callable[[], None]) -> None:
        self._then, self._set = then, False

    def wait(self, _: float) -> bool:
        if not self._set:
            self._then()
            return False
        return True

    def set(self) -> None:
        self._set = True

    def is_set(self) -> bool:
        return self._set


def test_a_watch_that_wakes_as_its_attempt_ends_interrupts_nobody(tmp_path: Path) -> None:
    task = AttemptTask("0", 1, CONFIG.model_dump_json(), tmp_path / "0" / "1")
    session = Counting()
    attempt: Any = AttemptRunner(task, lambda: session)
    attempt._ended = Wakes(attempt._release_lock)
    task.request_release()
    attempt._watch_for_release(session)
    assert session.interrupts == 0
    again: Any = AttemptRunner(task, lambda: session)
    again._ended = Wakes(lambda: again._ended.set() if session.interrupts else None)
    again._watch_for_release(session)
    assert session.interrupts == 1, "while it runs it is interrupted"


def test_in_a_shared_process_a_seat_that_was_left_is_not_given_up(tmp_path: Path) -> None:
    write_script(tmp_path)
    host = SharedWorker(tmp_path / "cache", FakeSession)
    host.start(make_task(tmp_path, 0))
    while host.next_report("0-1").result is None:
        pass
    host.close("0-1")
    host.start(make_task(tmp_path, 1))
    host.next_report("1-1")
    host.interrupt_orphan("0-1")  # the driver's word on the first trial comes late
    while (result := host.next_report("1-1").result) is None:
        pass
    assert result.status is AttemptStatus.FINISHED


def test_one_of_several_processes_ends_the_run_that_was_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_module, "_exit_with_raylet", lambda _: None)
    rank, session = RankActor(0, 2, tmp_path, lambda _: Counting()), Counting()
    rank._session = session  # pyright: ignore[reportPrivateUsage]
    rank.begin(1, CONFIG.model_dump_json(), tmp_path, [], None)
    rank.begin(2, CONFIG.model_dump_json(), tmp_path, [], None)
    rank.interrupt(1)
    assert session.interrupts == 0
    rank.interrupt(2)
    assert session.interrupts == 1


def test_the_processes_of_a_trial_are_not_told_of_an_interrupt_that_came_late(tmp_path: Path) -> None:
    class Alone(MultiProcessSession):
        def _start(self) -> None:
            self._actors = [self]

        def _call_all(self, method: str, *given: Any) -> dict[int, Any]:
            return {0: RankStep(result=RunResult(TrainerEnd.FINISHED, "", 0)) if method == "next" else None}

    ranks = Alone(tmp_path, FakeSession, 1, {"CPU": 1.0})
    assert status_of(ranks.train(CONFIG, tmp_path / "0")) is TrainerEnd.FINISHED
    ranks._actors = []  # pyright: ignore[reportPrivateUsage]
    ranks.interrupt()
    # Told of it, the second run would ask its processes to stop, which fails here: they are no actors.
    assert status_of(ranks.train(CONFIG, tmp_path / "1")) is TrainerEnd.FINISHED


def test_a_trial_that_waits_for_a_slot_uses_no_gpu(tmp_path: Path) -> None:
    """Two trials are issued where the cluster has room for one: they cannot overlap, and their times do not."""
    write_script(tmp_path, hold={"0": 2})
    here, two = Slots(count=1, gpus=0.0, threads=1), Slots(count=2, gpus=0.0, threads=1)
    with (
        SignalHandler(lambda: "") as signals,
        local_cluster(tmp_path / "ray", here, signals),
        Study.create(sweep_folder(tmp_path), make_spec(2), slots=2) as study,
    ):

        class Releasing(SilentView):
            def refresh(self) -> None:
                if [e.trial for e in study.events() if e.kind == "issued"] == [0, 1]:
                    write_script(tmp_path)

        assert run_study(study, view=Releasing(), signals=signals, slots=two).kind is StopKind.FINISHED
        first, second = (r.seconds for r in study.trials())
        issued = [e.seq for e in study.events() if e.kind == "issued"]
        ended = [e.seq for e in study.events() if e.kind == "complete"]
        assert issued[1] < ended[0], "the second one was issued while the first one ran"
        assert min(first, second) > 0
        assert first + second <= study.usage().hours * 3600
        assert study.usage().gpu_hours * 3600 == pytest.approx(first + second)
