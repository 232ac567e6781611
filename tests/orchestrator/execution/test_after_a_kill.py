"""What a driver that was killed leaves: the GPU-hours of its last report, and no pause of the whole sweep."""

import os
import signal
from pathlib import Path

import pytest

from orchestrator.execution import user_requests
from orchestrator.spec.sweep_spec import Budget
from orchestrator.study import running_trial
from orchestrator.study.study import Study
from tests.support.local_driver import KILLED, forked
from tests.support.specs import METRIC, make_spec, sweep_folder
from trainer.results import StepMetrics


def test_gpu_hours_after_a_kill_are_those_of_the_last_report_and_all_that_follows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock of our own; two GPUs a trial; killed five seconds after a report at ten."""
    now = 1000.0

    class Clock:
        @staticmethod
        def monotonic() -> float:
            return now

    monkeypatch.setattr(running_trial, "time", Clock)
    spec = make_spec(2, budget=Budget(gpu_hours=30 / 3600))
    Study.create(sweep_folder(tmp_path), spec).dispose()

    def killed() -> None:
        nonlocal now
        study = Study.open(sweep_folder(tmp_path))
        study.start_driving(2.0)
        trial = study.ask()
        now += 100.0  # it waits for a slot
        study.mark_started(trial)
        now += 10.0
        study.report(trial, [StepMetrics(1, {METRIC: 0.5})])
        now += 5.0
        os.kill(os.getpid(), signal.SIGKILL)

    assert forked(killed) == KILLED
    with Study.open(sweep_folder(tmp_path)) as study:
        assert study.usage().gpu_hours * 3600 == pytest.approx(20.0)
        now = 50.0
        study.start_driving(2.0)
        trial = study.ask()
        assert (trial.number, trial.attempt) == (0, 2)
        now += 100.0
        assert study.usage().gpu_hours * 3600 == pytest.approx(20.0), "waiting for a slot is no GPU time"
        study.mark_started(trial)
        now += 4.0
        assert study.usage().gpu_hours * 3600 == pytest.approx(28.0)
        assert study.no_more_trials_reason() == ""
        now += 1.0
        study.report(trial, [StepMetrics(2, {METRIC: 0.5})])
        assert study.usage().gpu_hours * 3600 == pytest.approx(30.0)
        assert study.no_more_trials_reason() == "0.00833 of 0.00833333 gpu_hours spent"
    with Study.open(sweep_folder(tmp_path)) as study:
        assert study.usage().gpu_hours * 3600 == pytest.approx(30.0)


def test_a_driver_killed_while_its_sweep_was_paused_leaves_no_pause(tmp_path: Path) -> None:
    Study.create(sweep_folder(tmp_path), make_spec(2)).dispose()

    def killed() -> None:
        study = Study.open(sweep_folder(tmp_path))
        study.start_driving()
        study.pause_sweep("lunch")
        os.kill(os.getpid(), signal.SIGKILL)

    assert forked(killed) == KILLED
    with Study.open(sweep_folder(tmp_path)) as study:
        assert user_requests.paused_notices(study) == [
            "s was paused when its last driver ended (lunch): it continues now"
        ]
        study.start_driving()
        assert study.pause_reason() == ""
        assert user_requests.paused_notices(study) == []
