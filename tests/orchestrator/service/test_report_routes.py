"""What the API concludes from sweeps is what the commands conclude; a page keeps its own policy."""

import csv
import io
import json
from typing import Any

from dashboards.diagnosis.diagnose import analyze
from orchestrator.commands.status import best, status
from orchestrator.folders import SweepFolder, create_sweep_folder
from orchestrator.report_data import as_json, load_sweep_frame, suggest
from orchestrator.service.access_tokens import Role
from orchestrator.service.routes.report_routes import _cell
from orchestrator.spec.loading.loader import load_spec_text
from orchestrator.spec.loading.serialization import dump_spec
from orchestrator.study.study import Study
from tests.support.scripted_sweep import Script, make_spec, run_sweep
from tests.support.service_caller import Caller, root


def sweeps(*names: str) -> None:
    for k, name in enumerate(names):
        run_sweep(root(), make_spec(name), lambda trial, k=k: Script(quality=0.2 + 0.1 * k + 0.02 * trial.number))


def folder(name: str) -> SweepFolder:
    return SweepFolder(root(), name)


def report(caller: Caller, name: str, code: int = 200) -> Any:
    return caller.answer("GET", f"/api/v1/sweeps/{name}/report", Role.VIEWER, code)


def test_report_diagnosis_and_best_are_those_of_the_commands(caller: Caller) -> None:
    sweeps("a")
    answer = report(caller, "a")
    policy = answer.headers["content-security-policy"]
    assert "script-src 'sha256-" in policy
    assert "unsafe-inline" not in policy.partition("style-src")[0]
    assert policy.endswith("; sandbox allow-scripts allow-popups allow-downloads")
    assert "<h1>a</h1>" in answer.text
    expected = json.loads(json.dumps(as_json(analyze(load_sweep_frame(folder("a"))))))
    assert caller.get("/sweeps/a/diagnosis") == expected
    found = caller.get("/sweeps/a/best")
    assert (found["number"], found["metrics"]) == (best("a", root())["number"], best("a", root())["metrics"])
    text = caller.answer("GET", "/api/v1/sweeps/a/suggestion", Role.VIEWER).text
    assert text == suggest("a", root(), None)


def test_a_sweeps_file_and_its_trials_are_saved_by_a_viewer(caller: Caller) -> None:
    sweeps("s")
    text = caller.answer("GET", "/api/v1/sweeps/s/file", Role.VIEWER).text
    assert load_spec_text(text, root() / "s", is_new=False) == make_spec("s")
    answer = caller.answer("GET", "/api/v1/sweeps/s/trials.csv", Role.VIEWER)
    assert answer.headers["content-disposition"] == 'attachment; filename="s.csv"'
    rows = list(csv.DictReader(io.StringIO(answer.text)))
    found = {str(trial["number"]): trial for trial in status("s", root())["trials"]}
    assert [row["number"] for row in rows] == list(found)
    for row in rows:
        assert float(row["params.loss.beta"]) == found[row["number"]]["params"]["loss.beta"]
        assert row["state"] == found[row["number"]]["state"]
    assert _cell("=1+1") == "'=1+1"


def test_a_report_is_made_again_only_after_a_change(caller: Caller) -> None:
    def made() -> str:
        report(caller, "a")
        text = caller.answer("GET", "/metrics", Role.VIEWER).text
        return next(line for line in text.splitlines() if line.startswith("prefsweep_report_seconds_count"))

    sweeps("a")
    assert made() == made() == "prefsweep_report_seconds_count 1"
    with Study.open(folder("a")) as study:
        study.add_event("paused", "by hand")
    assert made() == "prefsweep_report_seconds_count 2"
    create_sweep_folder(folder("new"), dump_spec(make_spec("new")))
    assert "has not started a trial yet" in report(caller, "new", code=422).json()["detail"]


def test_sweeps_are_compared_as_data_and_as_a_page(caller: Caller) -> None:
    sweeps("a", "b")
    found = caller.get("/compare?name=a&name=b")
    assert [sweep["sweep"] for sweep in found["sweeps"]] == ["b", "a"]
    page = caller.answer("GET", "/api/v1/compare/page?name=a&name=b", Role.VIEWER)
    assert "sandbox" in page.headers["content-security-policy"]
    assert "name at least two sweeps" in caller.get("/compare?name=a&name=a", code=422)["detail"]
    assert "did you mean 'b'?" in caller.get("/compare?name=a&name=bb", code=404)["detail"]
