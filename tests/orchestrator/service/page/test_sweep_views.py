"""A sweep's page is read and drawn once for all who look, and nobody waits while another request reads."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from optuna.importance import FanovaImportanceEvaluator

from dashboards.diagnosis.diagnose import analyze
from orchestrator.commands.status import status
from orchestrator.report_data import load_sweep_frame
from orchestrator.service.page import sweep_views
from orchestrator.service.page.sweep_views import Shown, SweepViews
from orchestrator.study.study import Study
from orchestrator.study.trial_records import Trial
from tests.support.metrics import COMPLETE, evaluated
from tests.support.scripted_sweep import Script, make_spec, run_sweep
from tests.support.storage_faults import counted_queries


@pytest.fixture
def views(fast_tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SweepViews:
    """Of the sweep `a`, without rests between readings."""
    run_sweep(fast_tmp_path, make_spec("a"), lambda _: Script(), trials=2)
    monkeypatch.setattr(sweep_views, "_LEAST_SECONDS", 0.0)
    monkeypatch.setattr(sweep_views, "_COST_FACTOR", 0.0)
    return SweepViews(fast_tmp_path)


class Halted:
    """A function that waits in the middle of its work until it is let go."""

    def __init__(self, work: Callable[..., Any]) -> None:
        self._work, self.calls = work, 0
        self.began, self.may_end = threading.Event(), threading.Event()

    def __call__(self, *arguments: Any) -> Any:
        self.calls += 1
        self.began.set()
        self.may_end.wait()
        return self._work(*arguments)


def change(root: Path) -> None:
    with Study.open(sweep_views.existing_sweep(root, "a")) as study:
        trial = study.ask()
        assert isinstance(trial, Trial)
        study.report(trial, [evaluated(1, 0.5)])


def test_a_sweep_is_read_once_at_a_moment_and_its_importance_computed_once_for_the_same_trials(
    fast_tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = {"training.learning_rate": {"choice": [1e-7, 3e-7, 1e-6, 3e-6, 1e-5]}}
    folder = run_sweep(fast_tmp_path, make_spec("b", rates), lambda t: Script(quality=0.5 + t.number / 20), trials=5)
    with Study.open(folder) as study:
        study.enqueue({"training.learning_rate": 1e-6}, "by hand", kind="enqueued")
        trial = study.ask()
        assert isinstance(trial, Trial)
        with counted_queries() as queries:
            shown = status("b", fast_tmp_path)
        assert [each["state"] for each in shown["trials"]] == ["COMPLETE"] * 5 + ["RUNNING"]
        assert sum("FROM trial_user_attributes" in query for query in queries) == 1
        forests: list[Any] = []
        made = FanovaImportanceEvaluator.evaluate
        monkeypatch.setattr(FanovaImportanceEvaluator, "evaluate", lambda *a, **k: forests.append(1) or made(*a, **k))
        analyses = [analyze(load_sweep_frame(folder))]
        study.report(trial, [evaluated(1, 0.1)])
        analyses.append(analyze(load_sweep_frame(folder)))
        assert len(forests) == 1
        study.tell(trial, COMPLETE)
        analyses.append(analyze(load_sweep_frame(folder)))
        assert len(forests) == 2
    first, second, third = (analysis.importances for analysis in analyses)
    assert first == second == {"training.learning_rate": 1.0}
    assert third == {"training.learning_rate": 1.0}


def test_while_one_request_reads_others_get_what_was_read_before(
    views: SweepViews, fast_tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = views.view("a")
    change(fast_tmp_path)
    reading = Halted(sweep_views.load_sweep_frame)
    monkeypatch.setattr(sweep_views, "load_sweep_frame", reading)
    found: list[Any] = []
    reader = threading.Thread(target=lambda: found.append(views.view("a")))
    reader.start()
    reading.began.wait()
    assert views.view("a") is first
    reading.may_end.set()
    reader.join()
    assert first.frame is not None
    assert len(found[0].frame.trials) == len(first.frame.trials) + 1
    assert reading.calls == 1


def test_panels_are_drawn_once_for_all_who_ask_and_before_a_followed_sweep_is_shown_anew(
    views: SweepViews, fast_tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    view = views.view("a")
    drawing = Halted(sweep_views._draw)
    monkeypatch.setattr(sweep_views, "_draw", drawing)
    found: list[Any] = []
    readers = [threading.Thread(target=lambda: found.append(views.panels(view, Shown()))) for _ in range(4)]
    for reader in readers:
        reader.start()
    drawing.began.wait()
    drawing.may_end.set()
    for reader in readers:
        reader.join()
    assert drawing.calls == 1
    assert all(panels is found[0] for panels in found)
    change(fast_tmp_path)
    later = views.view("a")
    assert drawing.calls == 2
    assert views.panels(later, Shown()) is not found[0]
    assert drawing.calls == 2
