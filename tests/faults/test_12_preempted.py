"""Case 12: SIGINT and SIGTERM: checkpoint, no failure, no trial counted; a second signal ends the driver at once."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from engine_driver import STEPS, check_exact, drive, finish, records, trained, wait_for
from scripted import write_script

from orchestrator.study.state import TrialState


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


@pytest.mark.faults
def test_a_second_signal_ends_the_driver_at_once(tmp_path: Path) -> None:
    write_script(tmp_path, steps=STEPS, pause=3.0)
    driver = drive(tmp_path)
    wait_for(lambda: len(trained(tmp_path)) >= 1, driver)
    driver.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    driver.send_signal(signal.SIGTERM)
    driver.wait(timeout=10)
    assert driver.returncode == 130
    assert "farewell" in driver.communicate()[1]
