"""Case 9: no trial stays RUNNING without a living owner, none is stolen from a slow one, and zombies are put down."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.execution.messages import AttemptStatus
from orchestrator.execution.workers.attempt_runner import AttemptRunner
from orchestrator.study.study import Study
from tests.support.driver_process import STEPS, check_exact, drive, finish, records, wait_for
from tests.support.fake_session import FakeSession, make_task, trained, write_script
from tests.support.mirrored_trial import pull_all
from tests.support.processes import LIMIT_SECONDS
from tests.support.specs import sweep_folder

WORKER = """
import sys, time
from pathlib import Path
from orchestrator.execution.workers.attempt_runner import AttemptRunner
from tests.support.fake_session import FakeSession, make_task
root = Path(sys.argv[1])
attempt = AttemptRunner(make_task(root), lambda: FakeSession(root / "cache"))
print(len(attempt.next_report().metrics), flush=True)
time.sleep(600)  # it is stopped and killed before
"""


def test_a_sleeping_worker_of_an_older_attempt_is_put_down(tmp_path: Path) -> None:
    write_script(tmp_path, steps=4)
    zombie = subprocess.Popen([sys.executable, "-c", WORKER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert zombie.stdout.readline() == "1\n"
    zombie.send_signal(signal.SIGSTOP)
    attempt = AttemptRunner(make_task(tmp_path, attempt=2), lambda: FakeSession(tmp_path / "cache"), lock_timeout=0.3)
    assert pull_all(attempt)[-1].result.status is AttemptStatus.FINISHED
    assert zombie.wait(timeout=LIMIT_SECONDS) == -signal.SIGKILL


def workers(pid: int) -> list[int]:
    import psutil

    found = psutil.Process(pid).children(recursive=True)
    return [p.pid for p in found if p.cmdline() and p.cmdline()[0].startswith("ray::DedicatedWorker")]


@pytest.mark.faults
def test_a_worker_that_sleeps_is_not_robbed_and_a_killed_one_is_replaced(tmp_path: Path) -> None:
    write_script(tmp_path, steps=STEPS, hold={"*": 4})
    driver = drive(tmp_path)
    wait_for(lambda: {"0 4", "1 4"} <= set(trained(tmp_path)), driver)
    first, second = workers(driver.pid)[:2]
    os.kill(first, signal.SIGSTOP)
    write_script(tmp_path, steps=STEPS, hold={"*": 10})
    wait_for(lambda: {"0 10", "1 10"} & set(trained(tmp_path)) != set(), driver)
    assert [r.attempts for r in records(tmp_path)][:2] == [1, 1], "slow is not dead"
    os.kill(first, signal.SIGCONT)
    os.kill(second, signal.SIGKILL)
    write_script(tmp_path, steps=STEPS)
    out, err = driver.communicate(timeout=LIMIT_SECONDS)
    assert (driver.returncode, out.strip()) == (0, "finished"), err
    check_exact(tmp_path)
    assert sorted(r.attempts for r in records(tmp_path)) == [1, 1, 1, 2]
    with Study.open(sweep_folder(tmp_path)) as study:
        assert [e.kind for e in study.events() if e.kind == "worker lost"] == ["worker lost"]
    finish(tmp_path)  # nothing is left to do
