"""The last report: a bug in it ends no sweep, and is kept where people look."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from dashboards.diagnosis import diagnose
from dashboards.sweep_reporter import DashboardReporter
from orchestrator.driver.parent_run import REPORT_FAILURE_FILE, DraftReport, write_final_report
from orchestrator.driver.sft_stage import TrialInputs
from orchestrator.driver.sweep_driver import _run_trials  # pyright: ignore[reportPrivateUsage]
from orchestrator.execution.stop_reasons import SignalHandler, StopKind, StopReason
from orchestrator.execution.workers.trial_worker import PrestartedWorkers
from orchestrator.interfaces import ReportFiles, UpdatesOf
from orchestrator.study.study import Study
from orchestrator.study.trial_records import TrialState
from tests.support.fake_session import SLOTS, FakeSession, write_script
from tests.support.recorders import ListSink, SilentView
from tests.support.specs import make_spec, sweep_folder


def test_a_bug_in_the_report_is_kept_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "gate-key-77")

    def broken(_: object) -> None:
        raise KeyError("margins of gate-key-77")

    monkeypatch.setattr(diagnose, "analyze", broken)
    view, sink = SilentView(), ListSink()
    with Study.create(sweep_folder(tmp_path), make_spec(1)) as study:
        study.ask()
        write_final_report(study, sink, view, DashboardReporter(), StopReason(StopKind.FINISHED))
        logged = [e.text for e in study.events() if e.kind == "report failed"]
    stored = (study.folder.path / REPORT_FAILURE_FILE).read_text()
    assert "KeyError" in logged[0]
    assert "in broken" in stored
    assert "gate-key-77" not in stored + logged[0] + " ".join(view.said)
    assert f"the traceback is in {study.folder.path / REPORT_FAILURE_FILE}" in view.said[-1]
    assert "orchestrate report s" in view.said[-1]
    assert [call[0] for call in sink.calls] == ["tag"], "the parent run is described, and no half report attached"


def test_a_first_report_is_written_while_the_last_trial_trains(tmp_path: Path, ray_cluster: None) -> None:
    class Reporter(DashboardReporter):
        def write_report(self, study: Study, state: str, *, updates_of: UpdatesOf | None) -> ReportFiles:
            files = super().write_report(study, state, updates_of=updates_of)
            (tmp_path / "report").touch()
            return files

    write_script(tmp_path, until={"5": "report"})  # the last trial trains once the report is there
    with Study.create(sweep_folder(tmp_path), make_spec(6)) as study:
        study.start_driving()
        draft = DraftReport(study.folder, study.spec, Reporter())
        inputs = TrialInputs(SimpleNamespace(lengths={"row": {"p100": 1}}, train_rows=8))  # pyright: ignore
        with PrestartedWorkers(SLOTS, study.folder.cache, FakeSession) as none_started:
            stop = _run_trials(
                study, ListSink(), SilentView(), SignalHandler(lambda: ""), SLOTS, inputs, FakeSession, none_started,  # pyright: ignore
                lambda _: None, draft,  # pyright: ignore
            )  # fmt: skip
        assert (stop.kind, [r.state for r in study.trials()]) == (StopKind.FINISHED, [TrialState.COMPLETE] * 6)
        assert "running" in study.folder.report.read_text()
        draft.wait(study)
        assert not any(e.kind.endswith("failed") for e in study.events())


def test_a_bug_in_the_first_report_is_kept_and_the_last_one_is_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(DashboardReporter):
        def write_report(self, study: Study, state: str, *, updates_of: UpdatesOf | None) -> ReportFiles:
            if state == "running":
                raise KeyError("margins")
            return super().write_report(study, state, updates_of=updates_of)

    with Study.create(sweep_folder(tmp_path), make_spec(1)) as study:
        study.ask()
        draft = DraftReport(study.folder, study.spec, Broken())
        draft.start()
        draft.wait(study)
        write_final_report(study, ListSink(), SilentView(), Broken(), StopReason(StopKind.FINISHED))
        assert [e.text for e in study.events() if e.kind == "draft of the report failed"] == ["KeyError: 'margins'"]
        assert study.folder.report.is_file()
