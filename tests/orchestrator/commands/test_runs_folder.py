"""`list`, `logs`, `delete`, `archive` and `clean` over real runs folders."""

import json
from contextlib import ExitStack
from pathlib import Path

import pytest

from orchestrator.cli import main
from orchestrator.commands.runs_folder.sweep_list import list_sweeps
from orchestrator.commands.runs_folder.sweep_logs import SweepLog
from orchestrator.folders import disk_usage, sweep_lock
from orchestrator.study.study import Study
from tests.support.metrics import COMPLETE
from tests.support.scripted_sweep import FAILED, Script, make_spec, run_sweep
from tests.support.storage_faults import counted_queries

RATES = {"training.learning_rate": {"choice": [3e-7, 1e-6]}}


def shown(capsys: pytest.CaptureFixture[str]) -> str:
    out = capsys.readouterr()
    return out.out + out.err


def test_list_has_the_disk_of_each_sweep(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run_sweep(home, make_spec("a", RATES), lambda trial: Script(quality=0.5 + 0.1 * trial.number))
    weights = folder.attempt(0, 1) / "model.safetensors"
    weights.write_bytes(b"w" * 300_000)
    before = disk_usage(folder.path)
    assert before >= 300_000
    (folder.forks / "1").mkdir(parents=True)
    (folder.forks / "1" / "model.safetensors").hardlink_to(weights)
    assert disk_usage(folder.path) - before < 100_000
    (home / "cache").mkdir()
    (home / "cache" / "file").write_bytes(b"c" * 5000)
    assert main(["list", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["cache"] == disk_usage(home / "cache")
    assert found["sweeps"][0]["disk"] == disk_usage(folder.path)
    assert main(["list"]) == 0
    row = shown(capsys).splitlines()[-1].split()
    assert row[:3] == ["a", "finished", "2/2"]
    assert row[-1] in ("kB", "MB")
    assert main(["status", "--json"]) == 0
    assert "disk" not in json.loads(capsys.readouterr().out)["sweeps"][0]


def test_listing_costs_the_same_queries_however_many_trials_and_none_where_nothing_changed(home: Path) -> None:
    def queries() -> int:
        with counted_queries() as seen:
            list_sweeps(home)
        return len(seen)

    run_sweep(home, make_spec("few"), lambda _: Script(files=False), trials=2)
    of_few = queries()
    assert 0 < of_few <= 50
    folder = run_sweep(home, make_spec("many"), lambda _: Script(files=False), trials=8)
    assert queries() == of_few
    assert queries() == 0
    with Study.open(folder) as study:
        study.enqueue({"loss.beta": 3.0}, "by hand", kind="enqueued")
    before = list_sweeps(home)
    assert {s["name"]: s["planned"] for s in before["sweeps"]} == {"few": 12, "many": 13}
    (home / "cache" / "list.json").write_text("{")
    assert list_sweeps(home) == before
    with sweep_lock(folder):  # a driver
        states = {sweep["name"]: sweep["state"] for sweep in list_sweeps(home)["sweeps"]}
    assert states == {"few": "interrupted", "many": "running"}


def test_logs_of_a_sweep_and_of_a_trial_with_tail_and_attempt(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run_sweep(home, make_spec("a", RATES), lambda t: Script(outcome=FAILED if t.number else COMPLETE))
    folder.log.parent.mkdir()
    folder.log.write_text("the driver's first line\nits last", encoding="utf-8")
    assert main(["logs", "a"]) == 0
    lines = shown(capsys).splitlines()
    assert lines[-2:] == ["the driver's first line", "its last"]
    assert any("trial 1: failed: RuntimeError: scripted" in line for line in lines)
    assert main(["logs", "a", "--tail", "1"]) == 0
    out = capsys.readouterr()
    assert out.out == "its last\n"
    assert out.err == f"{len(lines) - 1} earlier lines; `--tail 0` shows all\n"
    assert main(["logs", "a", "1", "-f"]) == 0  # ended: there is nothing to wait for
    of_trial = shown(capsys)
    assert "update 20: " in of_trial
    assert "attempt 1 failed (" in of_trial
    assert "Traceback" in of_trial
    assert "trial 0" not in of_trial
    assert main(["logs", "a", "1", "--attempt", "1"]) == 0
    assert "Traceback" in shown(capsys)
    for wrong, message in (
        (["logs", "a", "1", "--attempt", "2"], "trial 1 of a has no attempt 2 (it has 1 to 1)"),
        (["logs", "a", "7"], "a has no trial 7 (it has 0 to 1)"),
        (["logs", "aa"], "did you mean 'a'?"),
        (["logs", "a", "--attempt", "1"], "--attempt requires TRIAL"),
    ):
        assert main(wrong) == 2
        assert message in shown(capsys)


def test_a_followed_log_has_every_line_once_until_the_driver_ends(home: Path) -> None:
    folder = run_sweep(home, make_spec("a"), lambda _: Script(files=False), trials=1)
    folder.log.parent.mkdir()
    driver = ExitStack()
    with driver, SweepLog.open("a", home) as log:
        driver.enter_context(sweep_lock(folder))
        assert "created" in log.new_lines(at_end=False)[0]
        followed = log.followed()
        folder.log.write_text("one\nhalf", encoding="utf-8")
        assert next(followed) == ["one"]
        with Study.open(folder) as study:
            study.add_event("judged", "by hand", 0)
        with folder.log.open("a", encoding="utf-8") as file:
            file.write(" a line\n")
        event, line = next(followed)
        assert event.endswith("trial 0: judged: by hand")
        assert line == "half a line"
        replaced = folder.log.with_suffix(".new")
        replaced.write_text("of another driver", encoding="utf-8")
        replaced.rename(folder.log)
        driver.close()
        assert list(followed) == [["of another driver"]]
