"""Case 1: the driver is killed at any instant; the next one finishes exactly, and redoes little."""

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from orchestrator.study.study import Study
from orchestrator.study.trial_records import TrialState
from tests.faults.storm import storm
from tests.support.driver_process import STEPS, check_exact, command, drive, finish, records, wait_for
from tests.support.fake_session import trained, write_script
from tests.support.specs import sweep_folder


def test_a_killed_driver_is_followed_by_one_that_finishes_exactly(tmp_path: Path) -> None:
    write_script(tmp_path, steps=STEPS, hold={"*": 3})
    driver = drive(tmp_path)
    wait_for(lambda: len(trained(tmp_path)) >= 6, driver)
    second = subprocess.run(command(tmp_path), capture_output=True, text=True, check=False)
    assert second.returncode == 4
    assert f"pid {driver.pid} on" in second.stderr
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    assert any(r.state is TrialState.RUNNING for r in records(tmp_path))
    write_script(tmp_path, steps=STEPS)
    finish(tmp_path)
    check_exact(tmp_path)
    assert any(r.attempts > 1 for r in records(tmp_path))
    lines = trained(tmp_path)
    again = len(lines) - len(set(lines))
    assert again <= 2 * 3, f"{again} steps were trained twice: more than since the newest checkpoints"


@pytest.mark.faults
def test_killed_twenty_times_with_everything_it_started(tmp_path: Path) -> None:
    write_script(tmp_path, steps=STEPS, pause=0.5)
    chance, kills, before = random.Random(3), 0, dict[int, int]()
    while kills < 20:
        driver, seen = drive(tmp_path), len(trained(tmp_path))
        if chance.random() < 0.7:
            wait_for(lambda seen=seen, driver=driver: len(trained(tmp_path)) > seen or driver.poll() == 0, driver)
        time.sleep(chance.uniform(0.2, 3.0))
        if driver.poll() is not None:
            break
        os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()
        kills += 1
        if not sweep_folder(tmp_path).database.exists():
            continue
        steps = {r.number: r.step for r in records(tmp_path)}
        assert all(steps[number] >= step for number, step in before.items()), "progress went back"
        before = steps
    write_script(tmp_path, steps=STEPS)
    finish(tmp_path)
    check_exact(tmp_path)
    assert kills >= 8
    with Study.open(sweep_folder(tmp_path)) as study:
        assert sorted(e.trial or 0 for e in study.events() if e.kind == "complete") == [0, 1, 2, 3]


@pytest.mark.faults
def test_a_small_storm_of_real_trials(tmp_path: Path) -> None:
    tally = storm(tmp_path, kills=4, trials=6, seed=2, say=print)
    assert tally.differences == []
    assert (tally.kills, tally.trials_lost, tally.points_lost, tally.points_doubled) == (4, 0, 0, 0)
