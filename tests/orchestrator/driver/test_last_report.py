"""The last report: a bug in it ends no sweep, and is kept where people look."""

from pathlib import Path

import pytest

from dashboards.diagnosis import diagnose
from dashboards.sweep_reporter import DashboardReporter
from orchestrator.driver.parent_run import REPORT_FAILURE_FILE, write_final_report
from orchestrator.execution.stop_reasons import StopKind, StopReason
from orchestrator.study.study import Study
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
