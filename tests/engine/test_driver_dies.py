"""A driver that is killed, and one that is interrupted: what the next one finds, and that it finishes exactly."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from scripted import sweep_folder, write_script

from orchestrator.study.records import TrialRecord
from orchestrator.study.state import TrialState
from orchestrator.study.study import Study

HERE = Path(__file__).parent
STEPS = 12


def drive(root: Path) -> subprocess.Popen[str]:
    """Started as a terminal would: a process group of its own, which Ctrl-C reaches as a whole."""
    env = os.environ | {"PYTHONPATH": str(HERE)}
    command = [sys.executable, str(HERE / "drive.py"), str(root)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=env, stdout=pipe, stderr=pipe, text=True, start_new_session=True)


def wait_for(what: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not what():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until, "it took too long"
        time.sleep(0.1)


def finish(root: Path) -> None:
    driver = drive(root)
    out, err = driver.communicate(timeout=120)
    assert (driver.returncode, out.strip(), err) == (0, "finished", "")


def records(root: Path) -> list[TrialRecord]:
    with Study.open(sweep_folder(root)) as study:
        return study.trials()


def trained(root: Path) -> list[str]:
    log = root / "trained.log"
    return log.read_text().splitlines() if log.exists() else []


def check_exact(root: Path) -> None:
    with Study.open(sweep_folder(root)) as study:
        assert [r.state for r in study.trials()] == [TrialState.COMPLETE] * 4
        for number in range(4):
            assert [p.step for p in study.points(number)] == list(range(STEPS + 1))


def test_a_killed_driver_is_followed_by_one_that_finishes_exactly(tmp_path: Path) -> None:
    write_script(tmp_path, steps=STEPS, pause=1.0)
    driver = drive(tmp_path)
    wait_for(lambda: len(trained(tmp_path)) >= 6, driver)

    second = subprocess.run(
        [sys.executable, str(HERE / "drive.py"), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(HERE)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert second.returncode == 4
    assert f"pid {driver.pid} on" in second.stderr

    driver.send_signal(signal.SIGKILL)
    driver.wait()
    assert any(r.state is TrialState.RUNNING for r in records(tmp_path))
    write_script(tmp_path, steps=STEPS, pause=0.02)
    finish(tmp_path)
    check_exact(tmp_path)
    assert any(r.attempts > 1 for r in records(tmp_path))
    lines = trained(tmp_path)
    again = len(lines) - len(set(lines))
    assert again <= 2 * 3, f"{again} steps were trained twice: more than since the newest checkpoints"


def test_ctrl_c_checkpoints_and_the_next_driver_finishes_exactly(tmp_path: Path) -> None:
    write_script(tmp_path, steps=STEPS, pause=0.1)
    driver = drive(tmp_path)
    wait_for(lambda: len(trained(tmp_path)) >= 8, driver)
    os.killpg(driver.pid, signal.SIGINT)
    out, err = driver.communicate(timeout=60)
    assert (out.strip(), err) == ("interrupted", "")
    assert any(r.state is TrialState.RUNNING for r in records(tmp_path))
    write_script(tmp_path, steps=STEPS, pause=0.02)
    finish(tmp_path)
    check_exact(tmp_path)
    lines = trained(tmp_path)
    assert len(lines) == len(set(lines)), "nothing was trained twice"


@pytest.mark.slow
def test_a_second_signal_ends_the_driver_at_once(tmp_path: Path) -> None:
    write_script(tmp_path, steps=STEPS, pause=3.0)
    driver = drive(tmp_path)
    wait_for(lambda: len(trained(tmp_path)) >= 1, driver)
    began = time.monotonic()
    driver.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    driver.send_signal(signal.SIGTERM)
    driver.wait(timeout=10)
    assert time.monotonic() - began < 3
    assert driver.returncode == 130
    assert "farewell" in driver.communicate()[1]
