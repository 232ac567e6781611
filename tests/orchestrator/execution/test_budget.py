"""What ends a sweep beside its last trial: GPU-hours, a target; and pauses while a sampler waits."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from orchestrator.execution import user_requests
from orchestrator.execution.stop_reasons import StopKind
from orchestrator.spec.sweep_spec import Budget
from orchestrator.study.study import Study
from orchestrator.study.trial_records import RequestKind, TrialRecord, TrialState
from tests.orchestrator.execution.test_waiting_sampler import SPEC as WAITING
from tests.support.fake_session import run_study, trained, write_script
from tests.support.recorders import SilentView
from tests.support.specs import METRIC, make_spec, sweep_folder
from trainer.results import StepMetrics


def test_gpu_hours_end_a_sweep_and_more_of_them_go_on_with_it(tmp_path: Path, ray_cluster: None) -> None:
    write_script(tmp_path, steps=20, hold={"*": 6})  # no trial ends before the hours do
    with Study.create(sweep_folder(tmp_path), make_spec(4, budget=Budget(gpu_hours=2 / 3600))) as study:
        stop = run_study(study)
        assert stop.kind is StopKind.OUT_OF_BUDGET
        assert "of 0.000555556 gpu_hours spent" in stop.text
        assert "--set budget.gpu_hours=" in stop.text
        usage, left = study.usage().gpu_hours, study.trials()
        assert usage >= 2 / 3600
        assert {r.state for r in left} == {TrialState.RUNNING}, "kept, each at its checkpoint"
        assert study.usage().gpu_hours == pytest.approx(sum(r.seconds for r in left) / 3600)
        assert "gpu_hours spent" in study.no_more_trials_reason()
        write_script(tmp_path, steps=20)
        study.amend(make_spec(4, budget=Budget(gpu_hours=9.0)))
        assert run_study(study).kind is StopKind.FINISHED
        assert [r.state for r in study.trials()] == [TrialState.COMPLETE] * 4
        assert study.usage().gpu_hours > usage
    assert len(trained(tmp_path)) == len(set(trained(tmp_path))) == 4 * 20


@pytest.mark.slow
def test_a_target_ends_a_sweep_once_a_trial_completes_with_it(tmp_path: Path, ray_cluster: None) -> None:
    write_script(tmp_path)
    budget = Budget(target=0.53)
    with Study.create(sweep_folder(tmp_path), make_spec(8, budget=budget)) as study:
        stop = run_study(study)
        assert stop.kind is StopKind.TARGET
        found = next(r for r in study.trials() if r.value is not None and r.value >= 0.53)
        assert stop.text.startswith(f"trial {found.number} has {METRIC} {found.value:g}, the target is 0.53")
        assert len(study.trials()) < 8
        assert "reached the target" in study.no_more_trials_reason()
        assert run_study(study).kind is StopKind.TARGET, "resumed as it is, it has nothing to do"
        study.amend(make_spec(8, budget=Budget()))
        assert run_study(study).kind is StopKind.FINISHED
        assert [r.state for r in study.trials()] == [TrialState.COMPLETE] * 8


class Pausing(SilentView):
    """Pauses the sweep when trial 1 has ended, and takes it up again once it rests; then trial 0 may go on."""

    def __init__(self, study: Study, root: Path, then: RequestKind = RequestKind.UNPAUSE) -> None:
        super().__init__()
        self.study, self.root, self.asked, self.rested, self.then = study, root, False, 0, then

    def update_trial(self, record: TrialRecord) -> None:
        super().update_trial(record)
        if not self.asked and record.number == 1 and record.state.is_final:
            self.asked = True
            self.study.add_request(RequestKind.PAUSE, "lunch")

    def set_activity(self, text: str) -> None:
        super().set_activity(text)
        if text.startswith("paused: lunch"):
            self.rested += 1
            write_script(self.root)
            self.study.add_request(self.then, "back")


def test_paused_while_the_sampler_waits_it_ends_as_if_nothing_had_been(tmp_path: Path, ray_cluster: None) -> None:
    """Trial 2 may not be drawn before trial 0 has ended; trial 1 ends long before it, and then comes the pause."""

    def rows(study: Study) -> Sequence[Any]:
        return [(t.number, dict(t.params), t.state, t.reason, t.step, t.value) for t in study.trials()]

    write_script(tmp_path / "calm")
    with Study.create(sweep_folder(tmp_path / "calm"), WAITING, slots=2) as study:
        run_study(study)
        calm = rows(study)
    root = tmp_path / "paused"
    write_script(root, hold={"0": 2})
    with Study.create(sweep_folder(root), WAITING, slots=2) as study:
        view = Pausing(study, root)
        assert (run_study(study, view=view).kind, view.rested) == (StopKind.FINISHED, 1)
        assert rows(study) == calm
        order = [(e.kind, e.trial) for e in study.events() if e.kind in ("paused", "unpaused", "issued")]
        assert order.index(("paused", None)) < order.index(("issued", 2)), "the sampler was still waiting"
        assert next(r for r in study.trials() if r.number == 0).attempts == 2
        stops = [(event.kind, study.stop_reason()) for event in study.events() if event.kind == "stopping"]
        assert stops[0] == ("stopping", ""), "the pause is not why a driver that dies later has ended"
    assert len(trained(root)) == len(set(trained(root)))


@pytest.mark.parametrize("kind", [RequestKind.STOP, RequestKind.ABANDON])
def test_a_stop_while_paused_is_why_the_sweep_ended(tmp_path: Path, ray_cluster: None, kind: RequestKind) -> None:
    write_script(tmp_path, hold={"0": 2})
    with Study.create(sweep_folder(tmp_path), WAITING, slots=2) as study:
        stop = run_study(study, view=Pausing(study, tmp_path, kind))
        assert stop.kind is (StopKind.STOPPED if kind is RequestKind.STOP else StopKind.ABANDONED)
        assert study.stop_reason() == str(stop) == f"{stop.kind.value}: back"


def test_a_trial_that_the_sampler_waits_for_is_paused_and_the_next_driver_says_so(
    tmp_path: Path, ray_cluster: None
) -> None:
    write_script(tmp_path, hold={"0": 2})

    class Aside(SilentView):
        asked = False

        def add_metrics(self, number: int, metrics: Sequence[StepMetrics]) -> None:
            if number == 0 and not self.asked:
                self.asked = True
                study.add_request(RequestKind.PAUSE, "a debugger", trial=0)

    with Study.create(sweep_folder(tmp_path), WAITING, slots=2) as study:
        stop = run_study(study, view=Aside())
        assert stop.kind is StopKind.ONLY_PAUSED_LEFT
        assert stop.text == "0; `orchestrate unpause s 0` continues it"
        assert [r.state for r in study.trials()] == [TrialState.PAUSED, TrialState.COMPLETE], "nobody else may begin"
    with Study.open(sweep_folder(tmp_path)) as study:
        assert user_requests.paused_notices(study) == [
            "trial 0 stays paused (a debugger): `orchestrate unpause s 0` continues it"
        ]
        study.add_request(RequestKind.UNPAUSE, "done", trial=0)
        assert user_requests.paused_notices(study) == []
        write_script(tmp_path)
        assert run_study(study).kind is StopKind.FINISHED
        assert len(study.trials()) == 5
        assert user_requests.paused_notices(study) == []
