"""Commands on a real sweep: failed trials after their model is mended, a budget that changes, an abandoned sweep."""

import json
import os
import shutil
import signal
from pathlib import Path

import mlflow
import pytest

from tests.support.processes import LIMIT_SECONDS, called, finished, json_of, orchestrate, wait_until
from tests.support.small_trials import trial
from trainer.synthetic.tiny_models import generate_model

SWEEP = """
name: week
base:
  model: {name_or_path: ./model}
  data:
    train: {generated: instructions, rows: 40}
    eval: {generated: instructions, split: eval, rows: 6}
    max_length: 96
  training: {pairs_per_update: 8, max_steps: STEPS, eval_steps: 2, learning_rate: 1e-3}
  evaluation: {prompts: 1, samples: 1, max_new_tokens: 2}
search:
  loss.beta: [1.0, 2.0, 3.0, 4.0]
maximize: eval_accuracies/logp
budget: {concurrency: 1}
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder with a small model, beside the sweep's file."""
    generated = trial().model.generated
    assert generated is not None
    return Path(shutil.copytree(generate_model(generated, tmp_path / "cache"), tmp_path / "model"))


@pytest.mark.slow
def test_trials_that_failed_alike_are_trained_once_their_model_is_mended(tmp_path: Path, model: Path) -> None:
    root, file = tmp_path / "runs", tmp_path / "week.yaml"
    file.write_text(SWEEP.replace("STEPS", "4"), encoding="utf-8")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"intermediate_size": 2 * config["intermediate_size"]}))
    err = finished(root, "sweep", str(file), code=3)[1]
    assert "same bug in 3 trials in a row: " in err
    assert "3 of 3 trials failed and were never trained to the end: 0, 1, 2." in err
    assert "resumed, the sweep tries those that failed alike again" in err
    assert "resume week --retry-failed tries them again" in (root / "week" / "report.html").read_text()

    (model / "config.json").write_text(json.dumps(config))
    err = finished(root, "resume", "week")[1]
    assert "retrying 3 failed trials: 0, 1, 2 (week had stopped as they failed alike)" in err
    trials = json_of(root, "status", "week")["trials"]
    assert [(t["number"], t["state"], t["attempts"]) for t in trials] == [
        (0, "COMPLETE", 2),
        (1, "COMPLETE", 2),
        (2, "COMPLETE", 2),
        (3, "COMPLETE", 1),
    ]
    assert [t["params"]["loss.beta"] for t in trials] == [1.0, 2.0, 3.0, 4.0]
    assert [f["attempt"] for t in trials for f in t["failed_attempts"]] == [1, 1, 1]
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{root / 'mlflow.db'}")
    (experiment,) = [e for e in client.search_experiments() if e.name == "prefsweep"]
    runs = {r.data.tags["prefsweep.run"]: r.info.status for r in client.search_runs([experiment.experiment_id])}
    assert {run: status for run, status in runs.items() if run != "sweep"} == {
        **{str(number): "FINISHED" for number in range(4)},
        **{f"{number}, attempt 1": "FAILED" for number in range(3)},
    }
    assert "has no failed trial to retry" in finished(root, "resume", "week", "--retry-failed")[1]

    wider = "search.loss.beta=[1.0, 2.0, 3.0, 4.0, 6.0]"
    assert "4 is left out" in finished(root, "resume", "week", "--set", "search.loss.beta=[1, 2, 3]", code=2)[1]
    assert "changed search.loss.beta.choice" in finished(root, "resume", "week", "--set", wider)[1]
    after = json_of(root, "status", "week")["trials"]
    assert after[:4] == trials
    assert [(t["state"], t["params"]["loss.beta"]) for t in after[4:]] == [("COMPLETE", 6.0)]


@pytest.mark.slow
def test_one_command_starts_continues_and_ends_a_sweep_whose_bounds_may_change(tmp_path: Path, model: Path) -> None:
    """`sweep --continue`, as a scheduler repeats it; then `resume --set require...`, which trains nothing."""
    root, file = tmp_path / "runs", tmp_path / "week.yaml"
    text = SWEEP.replace("STEPS", "30").replace("[1.0, 2.0, 3.0, 4.0]", "[1.0, 2.0]") + "require: off\n"
    file.write_text(text, encoding="utf-8")
    again = ("sweep", str(file), "--continue")
    first = orchestrate(root, *again)
    assert first.stderr is not None
    for line in first.stderr:
        if line.startswith("trial 0 step 20/"):
            os.killpg(first.pid, signal.SIGTERM)
            break
    first.communicate(timeout=LIMIT_SECONDS)
    assert first.returncode == 130
    assert json_of(root, "status", "week")["state"] == "interrupted"
    finished(root, *again)
    trials = json_of(root, "status", "week")["trials"]
    assert [(t["state"], t["step"]) for t in trials] == [("COMPLETE", 30)] * 2
    best = json_of(root, "best", "week")["number"]
    finished(root, *again)
    assert json_of(root, "status", "week")["trials"] == trials, "nothing is left to train"

    def issued() -> list[int]:
        return [e["trial"] for e in json_of(root, "history", "week")["events"] if e["kind"] == "issued"]

    before = issued()

    change = ("resume", "week", "--set", 'require.eval_margins/logp=">= 1000"')
    out, err = finished(root, *change)
    assert 'changed require.eval_margins/logp: null -> ">= 1000.0"' in err
    assert "None of the 2 complete trials keeps every requirement" in out
    assert "No trial to export" in err
    found = json_of(root, "status", "week")
    assert (found["state"], found["best"], found["front"]) == ("finished", None, [])
    assert [t["breaks"][0].split(" < ")[1] for t in found["trials"]] == ["1000"] * 2
    assert "None of the 2 complete trials" in called(root, "status", "week")[0]
    assert "week: none of the 2 complete trials keeps every requirement" in called(root, "best", "week", code=3)[1]
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{root / 'mlflow.db'}")
    (experiment,) = [e for e in client.search_experiments() if e.name == "prefsweep"]

    def tags_of(run: str) -> dict[str, str]:
        runs = client.search_runs([experiment.experiment_id])
        return next(r.data.tags for r in runs if r.data.tags["prefsweep.run"] == run)

    assert tags_of("sweep")["best.trial"] == "none"
    assert tags_of("1")["breaks"].endswith("< 1000")
    file.write_text(text.replace("[1.0, 2.0]", "[1.0, 3.0]"), encoding="utf-8")
    assert "a sweep named 'week' exists" in finished(root, *again, code=2)[1], "of other settings"
    file.write_text(text, encoding="utf-8")
    finished(root, *again)
    assert json_of(root, "status", "week")["best"] is None, "a bound that was changed stays changed"

    finished(root, "resume", "week", "--set", "require.eval_margins/logp=off")
    assert json_of(root, "best", "week")["number"] == best
    assert tags_of("sweep")["best.trial"] == str(best)
    assert issued() == before, "nothing was trained for it"
    assert [t["attempts"] for t in json_of(root, "status", "week")["trials"]] == [t["attempts"] for t in trials]


@pytest.mark.slow
def test_a_running_sweep_takes_another_budget_and_is_abandoned(tmp_path: Path, model: Path) -> None:
    root, file = tmp_path / "runs", tmp_path / "week.yaml"
    file.write_text(SWEEP.replace("STEPS", "100000") + "resources: {cpus_per_trial: 0.5}\n", encoding="utf-8")
    driver = orchestrate(root, "sweep", str(file))

    def running() -> int:
        assert driver.poll() is None, driver.communicate()
        if not (root / "week" / "study.db").is_file():
            return 0
        trials = json_of(root, "status", "week")["trials"]
        return sum(t["state"] == "RUNNING" and t["step"] > 0 for t in trials)

    wait_until(lambda: running() == 1)
    assert "would end at once" in finished(root, "set", "week", "budget.hours=1e-9", code=2)[1]
    told = finished(root, "set", "week", "budget.concurrency=2", "budget.hours=50")[1]
    assert told == "requested budget.hours=50.0 budget.concurrency=2 of week: its driver takes it over\n"
    wait_until(lambda: running() == 2)
    assert [t["attempts"] for t in json_of(root, "status", "week")["trials"]] == [1, 1]
    events = json_of(root, "history", "week")["events"]
    assert [e["text"] for e in events if e["kind"] == "spec"] == [
        "budget.concurrency: 1 -> 2; budget.hours: null -> 50.0"
    ]
    finished(root, "stop", "week", "--abandon", "--why", "the wrong data")
    _, err = driver.communicate(timeout=LIMIT_SECONDS)
    assert driver.returncode == 130, err
    assert "Resume it with" not in err
    found = json_of(root, "status", "week")
    assert found["state"] == "abandoned"
    assert {t["state"] for t in found["trials"]} == {"PRUNED"}
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{root / 'mlflow.db'}")
    (experiment,) = [e for e in client.search_experiments() if e.name == "prefsweep"]
    assert {r.info.status for r in client.search_runs([experiment.experiment_id])} == {"KILLED"}
