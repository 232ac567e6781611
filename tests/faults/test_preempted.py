"""Case 12: SIGINT, SIGTERM and SIGHUP: checkpoint, no failure, no trial counted; a second one ends it at once.

Whoever sends it: Ctrl-C and `kill` of a group, a terminal that closes, `kill` of one process, `timeout`, systemd and
Slurm, which send to every process of a unit or step at once, and what closes a container, which sends to process 1.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.execution.local_cluster import starting_ray
from orchestrator.execution.messages import RELEASE_REQUEST_FILE
from orchestrator.execution.stop_reasons import SignalHandler, termination_blocked
from orchestrator.study.trial_records import TrialState
from tests.support.driver_process import STEPS, check_exact, drive, finish, records, wait_for
from tests.support.fake_session import trained, write_script
from tests.support.processes import LIMIT_SECONDS, wait_until
from tests.support.real_trials import is_alive

Sent = Callable[[subprocess.Popen[str]], None]


def descendants(pid: int) -> list[int]:
    """Every process below this one, children before their own children."""
    parents: dict[int, list[int]] = {}
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            try:
                parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:  # it ended meanwhile
                continue
            parents.setdefault(parent, []).append(int(path.name))
    found = [pid]
    for one in found:
        found += parents.get(one, [])
    return found[1:]


def every_process(driver: subprocess.Popen[str]) -> None:
    """As systemd's control-group kill: workers and Ray's own processes first, which is the worse order."""
    for pid in (*reversed(descendants(driver.pid)), driver.pid):
        os.kill(pid, signal.SIGTERM)


def inside(driver: subprocess.Popen[str]) -> None:
    """To process 1 of the container: the child of `unshare`."""
    os.kill(descendants(driver.pid)[0], signal.SIGTERM)


SENDERS: dict[str, tuple[list[str], Sent]] = {
    "ctrl-c": ([], lambda driver: os.killpg(driver.pid, signal.SIGINT)),
    "kill": ([], lambda driver: driver.send_signal(signal.SIGTERM)),
    "kill of the group": ([], lambda driver: os.killpg(driver.pid, signal.SIGTERM)),
    "terminal": ([], lambda driver: os.killpg(driver.pid, signal.SIGHUP)),
    "timeout": (["timeout", "3600"], lambda driver: driver.send_signal(signal.SIGTERM)),
    "systemd and slurm": ([], every_process),
    "container": (["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"], inside),
}
QUICK = ("terminal", "systemd and slurm")
"""In CI; there two tests of `tests/end_to_end` send Ctrl-C and kill the whole group."""


def started_by(before: list[str], root: Path) -> subprocess.Popen[str]:
    if before and shutil.which(before[0]) is None:
        pytest.skip(f"there is no {before[0]} here")
    if before and before[0] == "unshare" and subprocess.run([*before, "true"], check=False).returncode:
        pytest.skip("no namespace of processes may be made here")
    return drive(root, *before)


CASES = [
    pytest.param(QUICK, id="in turn"),
    *(pytest.param((sender,), id=sender, marks=pytest.mark.faults) for sender in SENDERS),
]


@pytest.mark.parametrize("senders", CASES)
def test_whoever_ends_it_trials_are_checkpointed_and_the_next_driver_finishes_exactly(
    tmp_path: Path, senders: tuple[str, ...]
) -> None:
    """One driver after the other is ended, each after three more updates of both trials; the last one is left alone."""
    for until, (before, send) in enumerate((SENDERS[sender] for sender in senders), 1):
        write_script(tmp_path, steps=STEPS, hold={"*": 3 * until})
        driver = started_by(before, tmp_path)
        wait_for(lambda until=until: len(trained(tmp_path)) >= 6 * until, driver)
        everybody = descendants(driver.pid)
        assert len(everybody) > 3, "Ray's processes and two workers"
        send(driver)
        out, err = driver.communicate(timeout=LIMIT_SECONDS)
        assert (out.strip(), err) == ("interrupted", "")
        wait_until(lambda everybody=everybody: not [pid for pid in everybody if is_alive(pid)])
        assert [r.state for r in records(tmp_path)] == [TrialState.RUNNING] * 2
    write_script(tmp_path, steps=STEPS)
    finish(tmp_path)
    check_exact(tmp_path)
    lines = trained(tmp_path)
    assert len(lines) == len(set(lines)), "nothing was trained twice"


@pytest.mark.faults
def test_a_second_signal_ends_the_driver_at_once(tmp_path: Path) -> None:
    write_script(tmp_path, steps=STEPS, hold={"*": 1}, deaf=True)
    driver = drive(tmp_path)
    wait_for(lambda: len(trained(tmp_path)) >= 1, driver)
    driver.send_signal(signal.SIGTERM)
    wait_until(lambda: list(tmp_path.rglob(RELEASE_REQUEST_FILE)))
    time.sleep(SignalHandler.SAME_SIGNAL_SECONDS)  # from here on a signal is a second one
    driver.send_signal(signal.SIGTERM)
    assert driver.wait(timeout=LIMIT_SECONDS) == 130
    assert "farewell" in driver.communicate()[1]


TWICE = """
import os, signal
from orchestrator.execution.stop_reasons import SignalHandler
now = [0.0]
with SignalHandler(lambda: "farewell", clock=lambda: now[0]) as interrupt:
    os.kill(os.getpid(), signal.SIGTERM)
    now[0] = {later}
    os.kill(os.getpid(), signal.SIGTERM)
    print("asked", interrupt.received)
"""


@pytest.mark.parametrize(("later", "code"), [(0.01, 0), (5.0, 130)])
def test_what_arrives_at_once_is_one_request(later: float, code: int) -> None:
    """`timeout` sends to its child and then to the group that the child is in."""
    done = subprocess.run(
        [sys.executable, "-c", TWICE.format(later=later)], capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stderr
    assert (done.stdout, done.stderr) == (("asked True\n", "") if code == 0 else ("", "\nfarewell\n"))


SIGTERM_HERE = "os.kill(os.getpid(), signal.SIGTERM)"
LOST = """
import os, signal, sys, threading, time
from orchestrator.execution.stop_reasons import SignalHandler
class Quick(SignalHandler):
    POLL_SECONDS = 0.01
looks = []
def lost():
    looks.append(1)
    return {lost}
with Quick(lambda: f"farewell after {{len(looks)}}") as interrupt:
    with interrupt.exit_when_lost(lost):
        signal.pthread_sigmask(signal.SIG_BLOCK, set()) # stays in one thread
        {send}
        {wait}
print("asked", interrupt.received, len(looks) > 0)
"""


@pytest.mark.parametrize(
    ("lost", "send", "wait", "out", "err"),
    [
        ("True", SIGTERM_HERE, "threading.Event().wait(900)", "", "\nfarewell after 4\n"),
        ("len(looks) == 2", SIGTERM_HERE, "while len(looks) < 6: time.sleep(0.01)", "asked True True\n", ""),
        ("True", "", "threading.Event().wait(0.5)", "asked False False\n", ""),
    ],
)
def test_after_a_signal_a_server_that_is_gone_is_not_waited_for(
    lost: str, send: str, wait: str, out: str, err: str
) -> None:
    code = LOST.format(lost=lost, send=send, wait=wait)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == (out, err)
    assert done.returncode == (130 if err else 0)


def test_a_server_that_is_gone_is_told_from_one_that_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    from orchestrator.execution.local_cluster import server_is_gone

    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"

        class Context:
            gcs_address = address

        monkeypatch.setattr(ray, "get_runtime_context", Context)
        gone = server_is_gone()
        assert not gone()
    assert gone()


def test_processes_started_meanwhile_are_not_reached_by_sigterm() -> None:
    with termination_blocked():
        child = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        words = ["bash", "-c", "cat; true"]  # as Ray starts its workers
        shell = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    for process in (child, shell):
        process.send_signal(signal.SIGTERM)
        assert process.communicate("still here")[0] == "still here"
        assert process.returncode == 0


def test_a_signal_while_ray_starts_is_the_drivers_own() -> None:
    """Ray would take SIGTERM for itself and end the process with code 15, without a word."""
    from ray._private import utils

    with SignalHandler(lambda: "") as signals:
        before = signal.getsignal(signal.SIGTERM)
        with starting_ray(signals):
            utils.set_sigterm_handler(lambda *_: sys.exit(15))
            assert signal.getsignal(signal.SIGTERM) == before
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # as Ray's core does
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received
