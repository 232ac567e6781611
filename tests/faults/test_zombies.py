"""Case 9: no trial stays RUNNING without a living owner, none is stolen from a slow one, and zombies are put down."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from orchestrator.execution.messages import AttemptStatus, AttemptTask
from orchestrator.execution.workers.attempt_runner import AttemptRunner
from orchestrator.study.study import Study
from tests.support.driver_process import check_exact, drive, finish, records, trained, wait_for
from tests.support.fake_session import ScriptedSession, make_spec, sweep_folder, write_script

WORKER = """
import sys, time
from pathlib import Path
from tests.support.fake_session import ScriptedSession, make_spec
from orchestrator.execution.workers.attempt_runner import AttemptRunner
from orchestrator.execution.messages import AttemptTask
root = Path(sys.argv[1])
job = AttemptTask("0", 1, make_spec().base.model_dump_json(), root / "trials" / "0000" / "1")
attempt = AttemptRunner(job, lambda: ScriptedSession(root / "cache"))
print(len(attempt.next_report().metrics), flush=True)
time.sleep(600)
"""


def test_a_sleeping_worker_of_an_older_attempt_is_put_down(tmp_path: Path) -> None:
    write_script(tmp_path, steps=4)
    command = [sys.executable, "-c", WORKER, str(tmp_path)]
    zombie = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert zombie.stdout is not None
    assert zombie.stdout.readline() == "1\n"
    zombie.send_signal(signal.SIGSTOP)
    folder = tmp_path / "trials" / "0000"
    task = AttemptTask("0", 2, make_spec().base.model_dump_json(), folder / "2", (folder / "1",))
    attempt = AttemptRunner(task, lambda: ScriptedSession(tmp_path / "cache"), lock_timeout=0.3)
    reports = [attempt.next_report() for _ in range(4)]
    assert reports[-1].result is not None
    assert reports[-1].result.status is AttemptStatus.FINISHED
    assert zombie.wait(timeout=5) == -signal.SIGKILL


def workers(pid: int) -> list[int]:
    import psutil

    found = psutil.Process(pid).children(recursive=True)
    return [p.pid for p in found if p.cmdline() and p.cmdline()[0].startswith("ray::Worker")]


@pytest.mark.faults
def test_a_worker_that_sleeps_is_not_robbed_and_a_killed_one_is_replaced(tmp_path: Path) -> None:
    write_script(tmp_path, steps=12, pause=0.4)
    driver = drive(tmp_path)
    wait_for(lambda: len(trained(tmp_path)) >= 4, driver)
    first, second = workers(driver.pid)[:2]
    os.kill(first, signal.SIGSTOP)
    time.sleep(6)
    assert [r.attempts for r in records(tmp_path)][:2] == [1, 1], "slow is not dead"
    os.kill(first, signal.SIGCONT)
    os.kill(second, signal.SIGKILL)
    write_script(tmp_path, steps=12, pause=0.02)
    out, err = driver.communicate(timeout=120)
    assert (driver.returncode, out.strip()) == (0, "finished"), err
    check_exact(tmp_path)
    assert sorted(r.attempts for r in records(tmp_path)) == [1, 1, 1, 2]
    with Study.open(sweep_folder(tmp_path)) as study:
        assert [e.kind for e in study.events() if e.kind == "worker lost"] == ["worker lost"]
    finish(tmp_path)  # nothing is left to do
