"""What is asked of a running driver beside its trials' ends: another budget, and a failed trial once more."""

from collections.abc import Sequence
from pathlib import Path

from orchestrator.execution.slots import Slots
from orchestrator.execution.stop_reasons import StopKind
from orchestrator.spec.loading.loader import load_spec
from orchestrator.spec.sweep_spec import Budget
from orchestrator.study.study import Study
from orchestrator.study.trial_records import RequestKind, TrialRecord, TrialState
from tests.support.fake_session import run_study, write_script
from tests.support.recorders import ListSink, SilentView
from tests.support.specs import make_spec, sweep_folder
from trainer.results import StepMetrics

CLUSTER_SLOTS = Slots(count=1, gpus=0.0, threads=1, fitting=2)


def test_concurrency_and_trials_change_without_a_stop(tmp_path: Path, ray_cluster: None) -> None:
    write_script(tmp_path, hold={"*": 2})  # no trial goes on before two run at a time

    class Asking(SilentView):
        asked, together, total = False, 0, 0

        def change_spec(self, spec: object, total: int | None) -> None:
            self.total = total or 0

        def add_metrics(self, number: int, metrics: Sequence[StepMetrics]) -> None:
            if not self.asked:
                self.asked = True
                study.add_request(RequestKind.SET, "budget.concurrency=2 budget.trials=3 (by me)")
            running = [r for r in study.trials() if r.state is TrialState.RUNNING and r.step >= 2]
            self.together = max(self.together, len(running))
            if self.together == 2:
                write_script(tmp_path)

    spec = make_spec(5, budget=Budget(concurrency=1))
    with Study.create(sweep_folder(tmp_path), spec, slots=1) as study:
        view = Asking()
        assert run_study(study, view=view, slots=CLUSTER_SLOTS).kind is StopKind.FINISHED
        assert (view.together, view.total) == (2, 3)
        assert [(r.state, r.attempts) for r in study.trials()] == [(TrialState.COMPLETE, 1)] * 3, "none was interrupted"
        assert study.requests() == []
        told = [e.text for e in study.events() if e.kind == "spec"]
        assert told == ["budget.concurrency: 1 -> 2; budget.trials: null -> 3"]
        assert load_spec(study.folder.spec).budget == Budget(concurrency=2, trials=3), "the sweep's file follows"
        assert "changed budget.concurrency: 1 -> 2" in view.said


def test_a_failed_trial_is_tried_again_by_the_running_driver(tmp_path: Path, ray_cluster: None) -> None:
    write_script(tmp_path, trials={"0": "bug"}, hold={"1": 2})

    class Mending(SilentView):
        def update_trial(self, record: TrialRecord) -> None:
            super().update_trial(record)
            if record.number == 0 and record.state is TrialState.FAILED:
                write_script(tmp_path)
                study.add_request(RequestKind.RETRY, "mended (by me)", 0)

    sink = ListSink()
    with Study.create(sweep_folder(tmp_path), make_spec(2), slots=1) as study:
        stop = run_study(study, sink=sink, view=Mending(), slots=CLUSTER_SLOTS)
        records = study.trials()
        assert stop.kind is StopKind.FINISHED
        assert [(r.state, r.attempts) for r in records] == [(TrialState.COMPLETE, 2), (TrialState.COMPLETE, 1)]
        (failed,) = records[0].failed_attempts
        assert failed.reason == "ValueError: scripted bug in trial 0"
        assert [p.step for p in study.metric_history(0)] == list(range(5))
        assert (study.folder.attempt(0, 1) / "failure.txt").is_file(), "the first attempt's traceback is still there"
        again = sink.of("start", "0")[-1][-1]
        assert again["prefsweep.first_attempt"] == "2"
        assert again["failed.attempt_1"] == failed.reason
        study.add_request(RequestKind.RETRY, "by me", 1)
        assert run_study(study, slots=CLUSTER_SLOTS).kind is StopKind.FINISHED
        answers = [e.text for e in study.events() if e.kind == "answered"]
        assert answers == ["trial 1 is not retried: it is COMPLETE, and only failed trials are"]
