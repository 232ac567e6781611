"""A driver over scripted trials on a real Ray, as a process that tests may kill."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from orchestrator.study.study import Study
from orchestrator.study.trial_records import TrialRecord, TrialState
from tests.support.fake_session import sweep_folder

STEPS = 12


def command(root: Path) -> list[str]:
    return [sys.executable, "-m", "tests.support.drive", str(root)]


def environment() -> dict[str, str]:
    return dict(os.environ)


def drive(root: Path) -> subprocess.Popen[str]:
    """Started as a terminal would: a process group of its own, which Ctrl-C reaches as a whole."""
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command(root), env=environment(), stdout=pipe, stderr=pipe, text=True, start_new_session=True
    )


def wait_for(what: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 240) -> None:
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
            assert [p.step for p in study.metric_history(number)] == list(range(STEPS + 1))
