"""Case 25: a wall clock that jumps moves nothing: order is by number, leases and budgets by the monotonic clock."""

import time
from pathlib import Path

import pytest

from orchestrator.folders import SweepFolder
from orchestrator.study.study import Study
from tests.support.local_driver import KILLED, drive, forked, killed_at
from tests.support.specs import GRID, make_spec
from tests.support.sweep_record import differences, sweep_record

DAY = 86400.0


def jumping(every: int = 5) -> None:
    """From here on the wall clock jumps a day forth and a day back, again and again."""
    real, calls = time.time, [0]

    def now() -> float:
        calls[0] += 1
        return real() + (0.0, DAY, -DAY)[calls[0] // every % 3]

    time.time = now


def test_a_sweep_under_a_jumping_clock(fast_tmp_path: Path) -> None:
    calm, jumpy = fast_tmp_path / "calm", fast_tmp_path / "jumpy"
    for root in (calm, jumpy):
        root.mkdir()
    assert forked(lambda: drive(calm)) == 0

    def go() -> None:
        jumping()
        drive(jumpy)

    assert killed_at(go, "trial.told:1") == KILLED
    assert forked(go) == 0
    found = sweep_record(jumpy, "s")
    assert differences(sweep_record(calm, "s"), found) == []
    assert not any(run["negative duration"] for run in found["mlflow"].values())
    with Study.open(SweepFolder(jumpy, "s")) as study:
        assert [e.seq for e in study.events()] == list(range(1, len(study.events()) + 1))
        assert all(0 <= r.seconds < 3600 for r in study.trials())
        assert all((r.finished_at or 0) >= (r.started_at or 0) for r in study.trials())
        assert study.usage().hours < 1


def test_a_day_by_the_wall_clock_spends_no_budget_and_steals_no_lease(
    fast_tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = make_spec(GRID, budget={"hours": 2.0})
    with Study.create(SweepFolder(fast_tmp_path, "s"), spec) as study:
        trial = study.ask()
        assert trial is not None
        real = time.time
        monkeypatch.setattr(time, "time", lambda: real() + 30 * DAY)
        study.heartbeat()
        assert study.no_more_trials_reason() == ""
        assert study.ask() is not None
        study.release(trial)
