"""Sweeps from Python: frames and verbs over a real study, the same sentences and codes as the commands."""

import html
import json
import math
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pandas
import pytest
import yaml

from orchestrator import api
from orchestrator.api.sweep_handle import as_overrides, ending
from orchestrator.api.sweep_runs import NotInMainThread
from orchestrator.commands.request_commands import RequestRefused
from orchestrator.errors import NameTaken, NoSuchSweep, NoTrialCompleted, SpecError, SweepHeld, SweepIncomplete
from orchestrator.folders import sweep_lock
from orchestrator.spec.loading.serialization import dump_spec
from orchestrator.study.study import Study
from orchestrator.study.trial_records import STOPPING, Trial
from tests.support.processes import called, json_of
from tests.support.scripted_sweep import DIVERGED, FAILED, PRUNED, Script, make_spec, run_sweep
from tests.support.specs import METRIC

HEAVY = ("torch", "transformers", "ray", "mlflow", "optuna", "datasets", "numpy", "pandas", "pydantic", "click")
OUTCOMES = {3: PRUNED, 5: DIVERGED, 7: FAILED}


def script(trial: Trial) -> Script:
    ended = {"outcome": OUTCOMES[trial.number]} if trial.number in OUTCOMES else {}
    return Script(quality=0.2 + 0.01 * trial.number, **ended)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    run_sweep(root, make_spec(), script)
    return root


@pytest.fixture
def own(tmp_path: Path) -> api.Sweep:
    """A sweep that the test changes."""
    run_sweep(tmp_path, make_spec(), lambda _: Script(), trials=2)
    return api.open_sweep("s", tmp_path)


def test_the_import_is_light() -> None:
    code = f"import sys, orchestrator.api; print([m for m in {HEAVY} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_trials_are_a_frame_of_the_status(runs: Path) -> None:
    sweep = api.open_sweep("s", runs)
    frame, listed = sweep.trials(), sweep.status()["trials"]
    assert list(frame.index) == [trial["number"] for trial in listed] == list(range(12))
    for trial in listed:
        row = frame.loc[trial["number"]]
        assert (row["state"], row["reason"], row["step"]) == (trial["state"], trial["reason"], trial["step"])
        assert {path: row[f"params.{path}"] for path in trial["params"]} == trial["params"]
        assert row[f"metrics.{METRIC}"] == trial["metrics"][METRIC]
        assert row["value"] == trial["value"] or (trial["value"] is None and math.isnan(row["value"]))
    assert frame["value"].dtype == float
    assert frame["value"].idxmax() == sweep.best()["number"] == 11


def test_metrics_are_the_learning_curves(runs: Path) -> None:
    sweep = api.open_sweep("s", runs)
    frame = sweep.metrics()
    with Study.open(sweep.folder, read_only=True) as study:
        expected = {
            (record.number, point.step): point.metrics
            for record in study.trials()
            for point in study.metric_history(record.number)
        }
    assert frame.index.names == ["trial", "step"]
    found = {place: {k: v for k, v in row.items() if not math.isnan(v)} for place, row in frame.T.to_dict().items()}
    assert found == expected
    some = sweep.metrics([METRIC, "no_such_metric"], trials=[2, 4], since=10)
    assert list(some.columns) == [METRIC, "no_such_metric"]
    assert set(some.index.get_level_values("trial")) == {2, 4}
    assert some.index.get_level_values("step").min() == 11
    assert some["no_such_metric"].isna().all()
    assert sweep.metrics(since=1000).empty


def test_numbers_that_json_lacks_are_numbers_in_the_frame(tmp_path: Path) -> None:
    run_sweep(tmp_path, make_spec(), lambda _: Script(loss=lambda step: math.inf if step else 1.0), trials=1)
    assert api.open_sweep("s", tmp_path).trials()["metrics.eval_loss"][0] == math.inf


def test_python_and_commands_answer_the_same(runs: Path, tmp_path: Path) -> None:
    sweep = api.open_sweep("s", runs)
    assert json.loads(json.dumps(sweep.status())) == json_of(runs, "status", "s")
    assert json.loads(json.dumps(sweep.history())) == json_of(runs, "history", "s")
    assert json.loads(json.dumps(sweep.best())) == json_of(runs, "best", "s")
    page = tmp_path / "page.html"
    made = sweep.report(page)
    assert json.loads(json.dumps(made.conclusions)) == json_of(runs, "report", "s", "--output", str(page))
    assert sweep.suggest() == called(runs, "suggest", "s")[0]
    assert sweep.log(7) == called(runs, "logs", "s", "7", "--tail", "0")[0].splitlines()
    listed = api.list_sweeps(runs)
    assert (listed.loc["s", "state"], listed.loc["s", "value"]) == ("finished", sweep.best()["value"])


def test_report_and_sweep_show_themselves_in_a_notebook(runs: Path, own: api.Sweep) -> None:
    made = api.open_sweep("s", runs).report()
    shown = made._repr_html_()  # pyright: ignore[reportPrivateUsage]
    found = re.fullmatch(r'<iframe srcdoc="([^"]*)" sandbox="allow-scripts" style="[^"]*"></iframe>', shown)
    assert found
    assert html.unescape(found[1]) == made.page == (runs / "s" / "report.html").read_text(encoding="utf-8")
    with Study.open(own.folder) as study:
        study.add_event(STOPPING, "<script>alert(1)</script>")
    shown = own._repr_html_()  # pyright: ignore[reportPrivateUsage]
    assert "s is interrupted: &lt;script&gt;" in shown
    assert "params.loss.beta" in shown
    assert "<script>" not in shown


def test_verbs_store_the_commands_requests(own: api.Sweep) -> None:
    (enqueued, *_) = own.enqueue({"loss.beta": 3.0, "loss.gamma": 0.5})
    assert "loss.beta=3.0" in enqueued
    assert "trial 1" in own.clone(1, ["loss.beta=4"], why="wider")[0]
    assert "budget.hours" in own.set_budget({"budget.hours": 2})[0]
    with Study.open(own.folder) as study:
        assert [waiting.settings["loss.beta"] for waiting in study.enqueued_trials()] == [3.0, 4.0]
        assert [request.kind for request in study.requests()] == ["set"]
    with sweep_lock(own.folder):
        assert "requested a pause" in own.pause(why="lunch")[0]
        assert "requested a stop" in own.stop()[0]
    with Study.open(own.folder) as study:
        requests = [(request.kind, request.text.partition(" (")[0]) for request in study.requests()]
    assert requests[1:] == [("pause", "lunch"), ("stop", "stopped")]


def test_refusals_are_the_errors_of_the_commands(own: api.Sweep, tmp_path: Path) -> None:
    with pytest.raises(NoSuchSweep, match="did you mean 's'"):
        api.open_sweep("ss", tmp_path)
    with pytest.raises(RequestRefused, match="is not running") as refused:
        own.stop()
    assert refused.value.code == api.ExitCode.USER
    with pytest.raises(SpecError) as wrong:
        own.enqueue({"loss.bta": 1, "training.learing_rate": 1e-6})
    assert [problem.hint for problem in wrong.value.problems] == [
        "did you mean loss.beta?", "did you mean training.learning_rate?",
    ]  # fmt: skip
    with pytest.raises(SpecError, match="mapping or a list"):
        own.enqueue("loss.beta=2")
    with sweep_lock(own.folder), pytest.raises(SweepHeld) as held:
        own.delete(keep_mlflow=True)
    assert held.value.code == api.ExitCode.LOCKED
    assert own.folder.path.is_dir()


def test_settings_keep_their_types() -> None:
    given = {"a": 1e-07, "b": "no", "c": None, "d": [1, "x"], "e": {"uniform": (1.0, 2.0)}, "f": Path("/x"), "g": True}
    texts = as_overrides(given)
    assert texts == (
        "a=1e-07", 'b="no"', "c=null", 'd=[1, "x"]', 'e={"uniform": [1.0, 2.0]}', 'f="/x"', "g=true",
    )  # fmt: skip
    assert as_overrides({"n": pandas.Series([3])[0]}) == ("n=3",)
    with pytest.raises(TypeError, match="cannot be the value"):
        as_overrides({"a": object()})


def test_a_mapping_is_loaded_as_the_file_is(tmp_path: Path) -> None:
    text = dump_spec(make_spec("m"))
    file = tmp_path / "m.yaml"
    file.write_text(text)
    from_file, from_mapping = api.load(file, {"loss.beta": 3.5}), api.load(yaml.safe_load(text), {"loss.beta": 3.5})
    assert dump_spec(from_file.spec) == dump_spec(from_mapping.spec)
    assert [notice.removeprefix(f"{file}:") for notice in from_file.notices] != [] != from_mapping.notices
    assert from_file.command() == f"orchestrate sweep {file} --set loss.beta=3.5"
    with pytest.raises(SpecError, match=r"mapping:\d+: base.loss.bta"):
        api.load({"name": "m", "base": {"loss": {"kind": "simpo", "bta": 1}}})


def test_wait_ends_with_the_driver_and_answers_with_its_code(own: api.Sweep, runs: Path) -> None:
    codes: list[Any] = []
    with sweep_lock(own.folder):
        with pytest.raises(TimeoutError, match="s still runs"):
            own.wait(timeout=0)
        waiting = threading.Thread(target=lambda: codes.append(own.wait(check=False)))
        waiting.start()
        assert waiting.is_alive()
    waiting.join()
    assert codes == [api.ExitCode.INTERRUPTED]
    with pytest.raises(SweepIncomplete, match="s ended") as stopped:
        own.wait()
    assert stopped.value.code == api.ExitCode.INTERRUPTED
    with pytest.raises(SweepIncomplete) as failed:
        api.open_sweep("s", runs).wait()
    assert failed.value.code == api.ExitCode.TRIALS_FAILED


@pytest.mark.parametrize(
    ("state", "why", "values", "failed", "code"),
    [
        ("finished", "the grid is complete", [1.0], [], 0),
        ("finished", "", [None], [0], 3),
        ("finished", "", [1.0, None], [1], 6),
        ("interrupted", "no disk: 3 GB are free", [1.0], [], 5),
        ("interrupted", "paused trials are left: 4", [1.0], [], 130),
        ("interrupted", "same bug: x", [1.0], [], 1),
        ("interrupted", "same bug: x", [], [], 3),
        ("interrupted", "", [1.0], [], 130),
        ("abandoned", "abandoned: by me", [1.0], [], 130),
    ],
)
def test_an_ended_sweep_has_the_exit_code_of_its_command(
    state: str, why: str, values: list[float | None], failed: list[int], code: int
) -> None:
    status = {"state": state, "why": why, "trials": [{"value": value} for value in values], "never_trained": failed}
    assert ending(status)[0] == code


def test_a_sweep_is_driven_by_the_main_thread_only(tmp_path: Path) -> None:
    errors: list[BaseException] = []

    def drive() -> None:
        try:
            api.run(yaml.safe_load(dump_spec(make_spec("m"))), runs=tmp_path / "runs")
        except NotInMainThread as error:
            errors.append(error)

    thread = threading.Thread(target=drive)
    thread.start()
    thread.join()
    assert len(errors) == 1
    assert not (tmp_path / "runs").exists()


def test_a_taken_name_is_refused_before_anything_is_written(own: api.Sweep) -> None:
    before = sorted(own.folder.root.rglob("*"))
    with pytest.raises(NameTaken):
        api.run(yaml.safe_load(dump_spec(make_spec())), runs=own.folder.root)
    with pytest.raises(SweepIncomplete, match="exists in") as refused:
        api.run(yaml.safe_load(dump_spec(make_spec())), runs=own.folder.root, detach=True)
    assert refused.value.code == api.ExitCode.USER
    assert sorted(own.folder.root.rglob("*")) == before


def test_a_sweep_without_a_complete_trial_has_no_best(tmp_path: Path) -> None:
    run_sweep(tmp_path, make_spec(), lambda _: Script(outcome=FAILED), trials=1)
    with pytest.raises(NoTrialCompleted) as error:
        api.open_sweep("s", tmp_path).best()
    assert error.value.code == api.ExitCode.NO_TRIAL_COMPLETED


def test_a_sweep_is_deleted_unless_the_confirmation_raises(own: api.Sweep) -> None:
    lines: list[str] = []

    def refuse(found: Any) -> None:
        lines.extend(found)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        own.delete(keep_mlflow=True, confirm=refuse)
    assert "cannot be undone" in lines[-1]
    assert own.folder.path.is_dir()
    assert own.delete(keep_mlflow=True) > 0
    assert not own.folder.path.exists()
