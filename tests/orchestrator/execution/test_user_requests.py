"""One driven sweep, and hands on it from other processes: each verb, and what is refused."""

import json
import os
from pathlib import Path

import pytest

from orchestrator.spec.loading.serialization import dump_spec
from orchestrator.study.study import Study
from orchestrator.study.trial_records import TrialRecord, TrialState
from tests.support.driver_process import drive, finish, records, wait_for
from tests.support.fake_session import trained, write_script
from tests.support.processes import LIMIT_SECONDS, called, json_of
from tests.support.specs import make_spec, sweep_folder

STEPS = {"1": 100_000, "*": 30}
"""Trial 1 goes on until it is pruned."""


def command_output(root: Path, *arguments: str) -> str:
    return called(root, *arguments)[1]


def refused(root: Path, *arguments: str) -> str:
    out, err = called(root, *arguments, code=2)
    assert out == ""
    assert "Traceback" not in err
    return err


def of(root: Path, number: int) -> TrialRecord:
    return next(r for r in records(root) if r.number == number)


def test_hands_on_a_running_sweep(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    write_script(root, steps=STEPS, hold={"*": 2})
    folder = sweep_folder(root)
    folder.path.mkdir(parents=True)
    folder.spec.write_text(dump_spec(make_spec(4)))
    assert "not running (`orchestrate resume s` runs it): it has no trials yet" in refused(root, "pause", "s")
    driver = drive(root)
    wait_for(lambda: {"0 2", "1 2"} <= set(trained(root)), driver)

    queued = command_output(root, "enqueue", "s", "--set", "training.seed=77")
    assert "it runs next" in queued
    assert "outside the search space: training.seed (0 to 3)" in queued
    assert "not running" not in queued
    assert "requested to pause trial 0 of s: it is checkpointed" in command_output(
        root, "pause", "s", "0", "--why", "a debugger needs the slot"
    )
    assert "requested to prune trial 1 of s: it ends as PRUNED" in command_output(
        root, "prune", "s", "1", "--why", "margins are flat"
    )
    # Both are inside an update that nobody lets them finish: neither waits for its next report.
    wait_for(lambda: [of(root, n).state for n in (0, 1)] == [TrialState.PAUSED, TrialState.PRUNED], driver)
    assert [line for line in trained(root) if line.startswith("1 ")] == ["1 1", "1 2"]
    pruned, paused = of(root, 1), of(root, 0)
    assert pruned.reason.startswith("by request: margins are flat (by ")
    assert f"@{os.uname().nodename}, pid " in pruned.reason
    assert paused.reason.startswith("a debugger needs the slot (by ")
    assert "is paused already" in refused(root, "pause", "s", "0")
    assert "trial 1 of s is PRUNED, which is final" in refused(root, "prune", "s", "1", "--why", "again")
    wait_for(lambda: of(root, 2).step >= 1, driver)
    assert (of(root, 2).params, of(root, 2).origin[:12]) == ({"training.seed": 77}, "enqueued by ")

    # A change of mind counts at once, whether the driver has taken up what was requested before or not.
    assert "running trials are checkpointed" in command_output(root, "pause", "s")
    assert "paused already" in refused(root, "pause", "s")
    assert command_output(root, "unpause", "s").startswith("requested to continue s")
    assert "s is not paused" in (not_paused := refused(root, "unpause", "s")) or "continued already" in not_paused
    assert "running trials are checkpointed" in command_output(root, "pause", "s")
    wait_for(lambda: json_of(root, "status", "s")["state"] == "paused", driver)
    done = trained(root)
    assert "s is paused already" in refused(root, "pause", "s")
    cloned = command_output(root, "clone", "s", "0", "--set", "training.max_steps=9", "--why", "shorter")
    assert "queued a clone of trial 0 with training.max_steps=9" in cloned
    found = json_of(root, "status", "s")
    assert found["why"].startswith("by ")
    assert any("clone of trial 0 with training.max_steps=9" in line for line in found["waiting"])
    assert trained(root) == done, "nothing trains while it is paused"
    write_script(root, steps=STEPS)
    command_output(root, "unpause", "s")
    command_output(root, "unpause", "s", "0")
    out, err = driver.communicate(timeout=LIMIT_SECONDS)
    assert (driver.returncode, out.strip(), err) == (0, "finished", "")

    ended = records(root)
    assert [r.state for r in ended] == [TrialState.COMPLETE, TrialState.PRUNED, *[TrialState.COMPLETE] * 4]
    assert [r.parent for r in ended if r.parent is not None] == [0]
    assert next(r for r in ended if r.parent == 0).params == {"training.seed": 0, "training.max_steps": 9}
    assert sorted(r.params["training.seed"] for r in ended if not r.origin) == [0, 1, 2, 3], "the grid is whole"
    lines = [line for line in trained(root) if not line.startswith("1 ")]
    assert len(lines) == len(set(lines)) == 5 * STEPS["*"], "paused twice, and no step was trained twice or lost"
    calls = [json.loads(line) for line in (root / "sink.jsonl").read_text().splitlines()]
    assert any(c[0] == "end" and c[1] == "0" and c[-1]["state"] == "PAUSED" for c in calls)
    assert any(c[0] == "start" and c[-1].get("clone.of") == "0" for c in calls)

    happened = [(e["kind"], e["trial"]) for e in json_of(root, "history", "s")["events"]]
    for event in (("paused", 0), ("paused", None), ("unpaused", 0), ("unpaused", None), ("pruned", 1), ("cloned", 0)):
        assert event in happened, event
    assert "margins are flat" in called(root, "history", "s")[0]
    _after_the_end(root)


def _after_the_end(root: Path) -> None:
    assert "s is not running: there is nothing to stop" in refused(root, "stop", "s")
    assert "s has no trial 99 (it has 0 to 5)" in refused(root, "prune", "s", "99", "--why", "x")
    wrong = refused(root, "enqueue", "s", "--set", "training.sed=1", "--set", "loss.beta=-1")
    assert "did you mean training.seed?" in wrong
    assert "Missing option '--why'" in refused(root, "prune", "s", "1")
    assert "without changes" in refused(root, "clone", "s", "1")
    requested = command_output(root, "enqueue", "s", "--set", "training.seed=79")
    assert "s is not running: the request takes effect at `orchestrate resume s`" in requested
    with Study.open(sweep_folder(root)) as study:
        assert study.no_more_trials_reason() == ""


@pytest.mark.slow
def test_requests_wait_for_the_next_driver_and_paused_trials_end_a_sweep_resumably(tmp_path: Path) -> None:
    root = tmp_path
    write_script(root, steps=4)
    folder = sweep_folder(root)
    folder.path.mkdir(parents=True)
    folder.spec.write_text(dump_spec(make_spec(4)))
    with Study.create(folder, make_spec(4)) as dead:  # a driver that was killed with two trials begun
        assert [t.number for t in (dead.ask(), dead.ask()) if t is not None] == [0, 1]
    assert "takes effect at `orchestrate resume s`" in command_output(root, "prune", "s", "0", "--why", "not worth it")
    assert "takes effect at" in command_output(root, "pause", "s", "1")
    first = drive(root)
    out, err = first.communicate(timeout=LIMIT_SECONDS)
    assert (first.returncode, out.strip(), err) == (0, "paused trials are left", "")
    assert [r.state.value for r in records(root)] == ["PRUNED", "PAUSED", "COMPLETE", "COMPLETE"]
    assert json_of(root, "status", "s")["state"] == "interrupted"
    command_output(root, "unpause", "s", "1")
    finish(root)
    assert [r.state.value for r in records(root)] == ["PRUNED", *["COMPLETE"] * 3]
