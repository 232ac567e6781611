"""Sweeps of earlier versions, kept in tests/golden/old_sweep, are read, compared, resumed and delivered to MLflow."""

import gzip
import json
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import called
from tests.support.without_ray import without_ray

OLD = Path(__file__).parents[1] / "golden" / "old_sweep"
OLD_HOME = "/runs2"
"""Where MLflow's database of the interrupted sweep says that its files are."""


def load_database(dump: str, database: Path) -> None:
    connection = sqlite3.connect(database)
    connection.executescript(dump)
    connection.close()


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A runs folder with both sweeps in it."""
    home = tmp_path / "runs"
    for name in ("finished", "interrupted"):
        shutil.copytree(OLD / name, home / name, ignore=shutil.ignore_patterns("study.sql"))
        load_database((OLD / name / "study.sql").read_text(encoding="utf-8"), home / name / "study.db")
    tracking = gzip.decompress((OLD / "mlflow.sql.gz").read_bytes()).decode()
    load_database(tracking.replace(f"file://{OLD_HOME}", f"file://{home}"), home / "mlflow.db")
    return home


def orchestrate(home: Path, *arguments: str) -> str:
    """The command's stdout."""
    return called(home, *arguments, COLUMNS="200")[0]


def read(home: Path, *arguments: str) -> dict[str, Any]:
    return json.loads(orchestrate(home, *arguments, "--json"))


def test_a_finished_sweep_is_read(home: Path) -> None:
    found = read(home, "status", "finished")
    assert (found["state"], [trial["state"] for trial in found["trials"]]) == ("finished", ["COMPLETE"] * 5)
    assert [trial["params"]["loss.beta"] for trial in found["trials"]] == [10.0, 10.0, 5.0, 2.0, 3.0]
    assert all(trial["step"] == trial["steps"] == 6 for trial in found["trials"])
    run_ids = json.loads((home / "finished" / "runs.json").read_text())
    assert {trial["run_id"] for trial in found["trials"]} == {run_ids[str(number)] for number in range(5)}
    winner = read(home, "best", "finished")
    assert (winner["number"], winner["metrics"]["eval_accuracies/logp"]) == (0, 0.75)
    kinds = [event["kind"] for event in read(home, "history", "finished")["events"]]
    assert kinds.count("complete") == 5
    assert "enqueued" in kinds
    orchestrate(home, "report", "finished")
    page = (home / "finished" / "report.html").read_text(encoding="utf-8")
    assert "Result" in page
    assert "eval_accuracies/logp" in page
    assert "loss.beta" in orchestrate(home, "suggest", "finished")


def test_sweeps_of_two_versions_are_compared(home: Path) -> None:
    text = orchestrate(home, "compare", "finished", "interrupted")
    assert "finished" in text
    assert "interrupted" in text


def mlflow_runs(home: Path) -> dict[str, tuple[str, str]]:
    """`sweep` and numbers of trials -> run id and status."""
    with sqlite3.connect(home / "mlflow.db") as connection:
        rows = connection.execute(
            "select t.value, r.run_uuid, r.status from runs r join tags t using (run_uuid) "
            "where t.key = 'prefsweep.run'"
        ).fetchall()
    return {name: (run_id, status) for name, run_id, status in rows}


def test_an_interrupted_sweep_is_resumed_and_extended(home: Path) -> None:
    before = read(home, "status", "interrupted")
    assert before["state"] == "interrupted"
    assert [(trial["state"], trial["step"]) for trial in before["trials"]] == [("COMPLETE", 60), ("RUNNING", 30)]
    run_ids = json.loads((home / "interrupted" / "runs.json").read_text())
    trial = home / "interrupted" / "trials" / "0001"
    checkpoint = json.loads((trial / "1" / "checkpoints" / "step-00000030" / "state.json").read_text())
    # As after a crash between a delivery and its note: every message of the old journal is delivered once more.
    (home / "interrupted" / "outbox" / "delivered.json").unlink()

    with without_ray():
        called(home, "resume", "interrupted", "--set", "budget.trials=4", "--set", "budget.concurrency=1")

    found = read(home, "status", "interrupted")
    assert (found["state"], [trial["state"] for trial in found["trials"]]) == ("finished", ["COMPLETE"] * 4)
    assert {trial["step"] for trial in found["trials"]} == {60}
    assert [trial["run_id"] for trial in found["trials"][:2]] == [run_ids["0"], run_ids["1"]]
    # Seconds differ from run to run: equal ones mean that nothing before the old checkpoint was trained again.
    old, new = checkpoint["history"], json.loads((trial / "2" / "ending.json").read_text())["history"]
    assert old[-1]["step"] == 30
    assert [point["metrics"] for point in new[: len(old)]] == [point["metrics"] for point in old]
    assert read(home, "best", "interrupted")["number"] in range(4)
    assert "Result" in (home / "interrupted" / "report.html").read_text(encoding="utf-8")

    runs = mlflow_runs(home)
    assert runs.keys() == {"sweep", "0", "1", "2", "3"}
    assert {status for _, status in runs.values()} == {"FINISHED"}
    assert {name: runs[name][0] for name in ("sweep", "0", "1")} == run_ids
    with sqlite3.connect(home / "mlflow.db") as connection:
        for name in ("0", "1", "2", "3"):
            steps = connection.execute(
                "select step, count(*) from metrics where key = 'loss' and run_uuid = ? group by step", (runs[name][0],)
            ).fetchall()
            assert dict(steps) == dict.fromkeys(range(5, 61, 5), 1), "each point once"
