"""What the API shows of trials: settings, attempts with tracebacks, metrics by key and update, answers, logs."""

from http import HTTPStatus

import pytest

from orchestrator.commands.status import history, status
from orchestrator.study.study import Study
from tests.support.metrics import COMPLETE
from tests.support.scripted_sweep import FAILED, Script, make_spec, run_sweep
from tests.support.service_caller import Caller, root
from tests.support.specs import METRIC

RATES = {"training.learning_rate": {"choice": [3e-7, 1e-6]}}


@pytest.fixture
def sweep(caller: Caller) -> Caller:
    """With the sweep `a`: trial 0 is complete, trial 1 has failed."""
    run_sweep(root(), make_spec("a", RATES), lambda trial: Script(outcome=FAILED if trial.number else COMPLETE))
    return caller


def test_a_trial_has_its_settings_its_attempts_and_their_tracebacks(sweep: Caller) -> None:
    found = sweep.get("/sweeps/a/trials/1")
    assert status("a", root())["trials"][1].items() <= found.items()
    assert found["config"]["training"]["learning_rate"] == 1e-6
    assert found["differs_from_best"] == {"training.learning_rate": [1e-6, 3e-7]}
    (attempt,) = found["attempt_list"]
    assert (attempt["attempt"], "Traceback" in attempt["traceback"]) == (1, True)
    assert {"issued", "failed"} <= {event["kind"] for event in found["events"]}
    assert sweep.get("/sweeps/a/trials/0")["attempt_list"][0]["traceback"] == ""
    missing = sweep.get("/sweeps/a/trials/7", code=HTTPStatus.NOT_FOUND)
    assert missing["detail"] == "a has no trial 7 (it has 0 to 1)"
    assert sweep.get("/sweeps/a/trials?state=FAILED")["trials"] == status("a", root())["trials"][1:]


def test_metrics_come_by_key_and_since_an_update_in_pages(sweep: Caller) -> None:
    with Study.open(run_sweep(root(), make_spec("b", RATES), lambda _: Script(files=False)), read_only=True) as study:
        whole = [{"step": point.step, "metrics": dict(point.metrics)} for point in study.metric_history(0)]
    assert sweep.get("/sweeps/b/trials/0/metrics")["points"] == whole
    found = sweep.get(f"/sweeps/b/trials/0/metrics?since=20&key={METRIC}&key=unknown")["points"]
    assert [point["step"] for point in found] == [30, 40]
    assert {name for point in found for name in point["metrics"]} == {METRIC}
    points, since = [], -1
    while since is not None:
        page = sweep.get(f"/sweeps/b/trials/0/metrics?limit=7&since={since}")
        points, since = points + page["points"], page["next"]
    assert points == whole
    both = sweep.get("/sweeps/b/metrics?key=loss&limit=5")
    assert {number: [p["step"] for p in rows] for number, rows in both["trials"].items()} == {
        "0": [1, 2, 3, 4],
        "1": [1, 2, 3, 4],
    }
    assert both["cut"] == {"0": 4, "1": 4}
    late = sweep.get("/sweeps/b/trials/1/metrics?since=38")["points"]
    assert sweep.get("/sweeps/b/metrics?trial=1&since=38")["trials"] == {"1": late}


def test_answers_stand_beside_those_of_the_initial_model(sweep: Caller) -> None:
    found = sweep.get("/sweeps/a/trials/0/samples")
    assert [(row["step"], row["answer"]) for row in found["samples"]] == [(0, "a good answer"), (40, "a fine answer")]
    (root() / "a" / "trials" / "0000" / "1" / "samples.jsonl").write_text("{")
    damaged = sweep.get("/sweeps/a/trials/0/samples")
    assert damaged["samples"] == []
    assert "cannot be read" in damaged["notices"][0]


def test_the_end_of_a_log_and_the_history_come_in_pages(sweep: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hidden-in-the-log")
    log = root() / ".detached" / "a.log"
    log.parent.mkdir()
    log.write_text("first\nthe token is hidden-in-the-log\n", encoding="utf-8")
    found = sweep.get("/sweeps/a/log?tail=2")
    assert found["lines"] == ["first", "the token is ***"]
    assert found["earlier"] == len(history("a", root())["events"])
    assert "Traceback" in "\n".join(sweep.get("/sweeps/a/log?trial=1&tail=5")["lines"])
    seen, after = list[int](), 0
    while after is not None:
        page = sweep.get(f"/sweeps/a/history?limit=3&after={after}")
        seen, after = seen + [event["seq"] for event in page["events"]], page["next"]
    assert seen == [event["seq"] for event in history("a", root())["events"]]


def test_of_a_long_log_the_end_is_read(sweep: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.service.routes.trial_routes._LOG_BYTES", 20)
    log = root() / ".detached" / "a.log"
    log.parent.mkdir()
    log.write_text("x" * 1000 + "\nthe last line\n", encoding="utf-8")
    assert sweep.get("/sweeps/a/log?tail=3")["lines"][-3:] == [
        "[995 bytes are left out here]",
        "xxxxx",
        "the last line",
    ]
