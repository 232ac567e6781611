"""What the sweep's run says of it in MLflow while it runs: the diagnosis too; a bug in a rule ends nothing."""

import threading
from pathlib import Path
from typing import Any

import pytest

from dashboards import sweep_reporter
from dashboards.diagnosis import diagnose
from dashboards.sweep_reporter import DashboardReporter
from orchestrator.driver.parent_run import REPORT_FAILURE_FILE, RunningDescription, update_description
from orchestrator.interfaces import SWEEP_RUN
from orchestrator.study.study import Study
from orchestrator.tracking.run_metadata import NOTE
from tests.support.recorders import ListSink
from tests.support.scripted_sweep import Script, make_spec, run_sweep


@pytest.fixture
def study(tmp_path: Path) -> Study:
    """Two of many trials are over; what was chosen got less likely in both."""
    return Study.open(run_sweep(tmp_path, make_spec(), lambda _: Script(chosen=-3.0), trials=2))


def description_of(study: Study) -> str:
    sink = ListSink()
    update_description(study, sink, DashboardReporter())
    return sink.tags(SWEEP_RUN)[NOTE]


def test_the_diagnosis_is_there_while_the_sweep_runs(study: Study) -> None:
    text = description_of(study)
    assert text.startswith("**Running**: 2 trials (2 complete).")
    assert "### Diagnosis" in text
    assert "*Next: " in text


def test_a_sweep_of_very_many_trials_reads_no_points_for_it(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: object) -> None:
        raise AssertionError("points were read")

    monkeypatch.setattr(sweep_reporter, "MAX_DIAGNOSED_TRIALS", 1)
    monkeypatch.setattr(study, "metric_history", read)
    assert "### Diagnosis" not in description_of(study)


def test_a_rule_that_fails_is_kept_and_ends_nothing(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: object) -> None:
        raise KeyError("margins")

    monkeypatch.setattr(diagnose, "diagnose", broken)
    text = description_of(study)
    assert text.startswith("**Running**: 2 trials")
    assert "### Diagnosis" not in text
    assert [e.text for e in study.events() if e.kind == "diagnosis failed"] == ["KeyError: 'margins'"]
    assert "in broken" in (study.folder.path / REPORT_FAILURE_FILE).read_text()


class SlowReporter(DashboardReporter):
    """Describes once it is let go."""

    def __init__(self) -> None:
        self.began, self.go = threading.Event(), threading.Event()

    def describe(self, *given: Any, **more: Any) -> str:
        self.began.set()
        assert self.go.wait(900)
        return super().describe(*given, **more)


def test_the_driver_does_not_wait_for_a_description(study: Study) -> None:
    sink, reporter = ListSink(), SlowReporter()
    with RunningDescription(study, sink, reporter) as description:
        description.update()
        assert reporter.began.wait(900)
        description.update()  # returns while the first is being prepared
        assert not sink.calls
        reporter.go.set()
    description.update()
    assert "### Diagnosis" in sink.tags(SWEEP_RUN)[NOTE]


def test_a_rule_that_fails_while_the_sweep_runs_is_recorded_too(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: object) -> None:
        raise KeyError("margins")

    monkeypatch.setattr(diagnose, "diagnose", broken)
    sink = ListSink()
    with RunningDescription(study, sink, DashboardReporter()) as description:
        description.update()
    description.update()
    assert sink.tags(SWEEP_RUN)[NOTE].startswith("**Running**: 2 trials")
    assert [e.text for e in study.events() if e.kind == "diagnosis failed"] == ["KeyError: 'margins'"]
