"""Case 13: workers of a dead driver end, and write into no newer attempt; requests still reach the next driver."""

import signal
from pathlib import Path

import psutil
import pytest

from orchestrator.study.study import Study
from orchestrator.study.trial_records import TrialState
from tests.support.driver_process import STEPS, check_exact, drive, finish, records, wait_for
from tests.support.fake_session import trained, write_script
from tests.support.processes import LIMIT_SECONDS
from tests.support.specs import sweep_folder


def alive(processes: list[psutil.Process]) -> list[str]:
    return [p.name() for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):  # it ends as we look
        return ""


@pytest.mark.faults
def test_no_orphan_trains_on(tmp_path: Path) -> None:
    write_script(tmp_path, steps=STEPS, hold={"*": 3})
    driver = drive(tmp_path)
    wait_for(lambda: len(trained(tmp_path)) >= 6, driver)
    below = psutil.Process(driver.pid).children(recursive=True)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    write_script(tmp_path, steps=STEPS)  # an orphan that lived could train on
    ended = {r.number: r.state for r in records(tmp_path) if r.state is not TrialState.RUNNING}
    _, left = psutil.wait_procs([p for p in below if "ray::DedicatedWorker" in title(p)], timeout=LIMIT_SECONDS)
    assert alive(left) == [], "they outlive their driver"
    assert max(int(line.split()[1]) for line in trained(tmp_path)) < STEPS, "somebody trained on"
    folder = sweep_folder(tmp_path)
    first = [folder.attempt(record.number, 1) for record in records(tmp_path)]
    before = {p: p.stat().st_mtime_ns for path in first for p in path.rglob("*")}
    finish(tmp_path)
    assert {p: p.stat().st_mtime_ns for path in first for p in path.rglob("*")} == before
    check_exact(tmp_path)
    _, left = psutil.wait_procs(below, timeout=LIMIT_SECONDS)  # Ray's agents notice after a minute; they train nothing
    assert alive(left) == []
    assert all(r.state is ended.get(r.number, r.state) for r in records(tmp_path))


@pytest.mark.faults
def test_a_request_works_after_a_resume(tmp_path: Path) -> None:
    write_script(tmp_path, steps=100_000, hold={"*": 2})
    driver = drive(tmp_path)
    wait_for(lambda: len(trained(tmp_path)) >= 4, driver)
    driver.kill()
    driver.wait()
    write_script(tmp_path, steps=100_000)
    again, seen = drive(tmp_path), len(trained(tmp_path))
    wait_for(lambda: len(trained(tmp_path)) > seen, again)
    with Study.open(sweep_folder(tmp_path)) as study:
        study.add_request("stop", "enough of trial 0", trial=0)
    wait_for(lambda: records(tmp_path)[0].state is TrialState.PRUNED, again)
    assert records(tmp_path)[0].reason == "by request: enough of trial 0"
    with Study.open(sweep_folder(tmp_path)) as study:
        study.add_request("stop", "enough")
    out, err = again.communicate(timeout=LIMIT_SECONDS)
    assert (again.returncode, out.strip()) == (0, "stopped"), err
