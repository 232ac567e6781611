"""Case 6: one driver at a time. The second is refused and told who drives; one that slept and wakes is refused too."""

import multiprocessing
import os
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from queue import SimpleQueue
from threading import Event
from typing import Any

import psutil
import pytest

from orchestrator.errors import ExitCode, NameTaken, SweepHeld
from orchestrator.folders import SweepFolder, create_sweep_folder
from orchestrator.spec.loading.serialization import dump_spec
from orchestrator.study.database import driver_lease, process_identity
from orchestrator.study.study import Study
from orchestrator.tracking.outbox import Outbox
from tests.support.local_driver import forked_together
from tests.support.metrics import evaluated
from tests.support.processes import LIMIT_SECONDS, wait_until
from tests.support.recorders import ListSink
from tests.support.specs import GRID, make_spec

DRIVER = """
import sys, time
from pathlib import Path
from tests.support.metrics import evaluated
from orchestrator.errors import SweepHeld
from orchestrator.folders import SweepFolder
from orchestrator.study.database import driver_lease as lease, process_identity
from orchestrator.study.study import Study
root, machine, what = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
lease.SILENCE_TIMEOUT, lease.HEARTBEAT_SECONDS = float(sys.argv[4]), 0.2
if machine != "here":
    process_identity._machine_id = lambda: machine
study = Study.open(SweepFolder(root, "s"))
try:
    trial = study.ask()
    print("drives", trial.number, trial.attempt, flush=True)
    step = 0
    if what == "rests":
        study.pause_sweep("lunch")
    while not (root / "enough").exists():
        time.sleep(0.1)
        if what == "trains":
            study.report(trial, [evaluated(step := step + 1, 0.1 * trial.attempt)])
    study.dispose()
except SweepHeld as error:
    print(error, flush=True)
    zombie = study.fenced
    late = lambda: study.add_event("late", "x")
    for write in (late, lambda: study.complete_request(1), lambda: study.add_request("stop")) * zombie:
        try:
            write()
            print("written", flush=True)
        except SweepHeld:
            print("refused", flush=True)
    sys.exit(4)
"""


@pytest.fixture
def root(fast_tmp_path: Path) -> Path:
    Study.create(SweepFolder(fast_tmp_path, "s"), make_spec(GRID)).dispose()
    return fast_tmp_path


def driver(root: Path, machine: str = "here", what: str = "trains", patience: float = 60.0) -> subprocess.Popen[str]:
    """A driver in a process of its own; on another machine than this one as far as it can tell.

    `patience`: seconds without a sign of life after which another one is gone.
    """
    command = [sys.executable, "-c", DRIVER, str(root), machine, what, str(patience)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def next_line(process: subprocess.Popen[str]) -> str:
    return process.stdout.readline().strip()


def stop_between_writes(process: subprocess.Popen[str], root: Path) -> None:
    """Stop a driver that holds no lock of the database, for which the others would wait in vain."""
    while True:
        process.send_signal(signal.SIGSTOP)
        wait_until(lambda: psutil.Process(process.pid).status() == psutil.STATUS_STOPPED)
        with closing(sqlite3.connect(SweepFolder(root, "s").path / "study.db", timeout=0.0)) as connection:
            try:
                connection.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError:
                process.send_signal(signal.SIGCONT)
            else:
                return


def test_a_driver_that_slept_finds_its_writes_refused(root: Path) -> None:
    """As machines see it that share nothing but the study: no lock of the folder, no look at each other's processes."""
    first = driver(root, "a", patience=1.0)
    assert next_line(first) == "drives 0 1"
    second = driver(root, "b")
    assert f"pid {first.pid} on" in next_line(second), "a living driver is not robbed"
    assert second.wait() == ExitCode.LOCKED

    stop_between_writes(first, root)
    third = driver(root, "b", patience=1.0)
    assert next_line(third) == "drives 0 2"
    with Study.open(SweepFolder(root, "s")) as study:
        assert study.add_request("pause", "for the new driver", trial=0) == 1
    first.send_signal(signal.SIGCONT)
    assert f"pid {third.pid} on" in next_line(first)
    assert [next_line(first) for _ in range(3)] == ["refused"] * 3, "notes and answers pass the fence as well"
    assert first.wait() == ExitCode.LOCKED
    (root / "enough").touch()
    assert third.wait() == 0
    with Study.open(SweepFolder(root, "s")) as study:
        assert study.trials()[0].attempts == 2
        steps = [p.step for p in study.metric_history(0)]
        assert steps == list(range(1, len(steps) + 1))
        assert [e.text.split()[1] for e in study.events() if e.kind == "driver"] == [str(first.pid), str(third.pid)]
        assert not any(e.kind == "late" for e in study.events())
        assert [r.seq for r in study.requests()] == [1], "the zombie has eaten none"


@pytest.mark.parametrize("what", ["rests", "waits"])
def test_a_driver_that_has_nothing_to_write_is_not_overtaken(root: Path, what: str) -> None:
    """A paused sweep's, or one that waits for something slow: longer than the other one's patience."""
    first = driver(root, "a", what)
    assert next_line(first) == "drives 0 1"
    with Study.open(SweepFolder(root, "s")) as study:
        if what == "rests":
            wait_until(study.pause_reason)
        began, used = time.monotonic(), study.usage().hours
        second = driver(root, "b")
        assert f"pid {first.pid} on" in next_line(second)
        assert second.wait() == ExitCode.LOCKED
        (root / "enough").touch()
        assert first.wait() == 0
        if what == "rests":
            passed = time.monotonic() - began
            assert (study.usage().hours - used) * 3600 < passed / 2, "a pause is no working time, whatever beats"


def test_a_process_that_lives_on_this_machine_is_never_overtaken(root: Path) -> None:
    first = driver(root)
    assert next_line(first) == "drives 0 1"
    stop_between_writes(first, root)
    second = driver(root)
    refused = next_line(second)
    assert f"pid {first.pid} on" in refused
    assert "stopped by a signal" in refused, "the way out is said: it answers no request"
    assert second.wait() == ExitCode.LOCKED
    first.send_signal(signal.SIGCONT)
    (root / "enough").touch()
    assert first.wait() == 0


@pytest.fixture
def nobody_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Watching a silent driver takes a minute; where it is known to be gone there is nothing to watch."""

    def watched(*_: object) -> bool:
        raise AssertionError("a driver that has gone was watched for signs of life")

    monkeypatch.setattr(driver_lease, "watch_heartbeat", watched)


@pytest.mark.usefixtures("nobody_watches")
def test_a_killed_driver_is_followed_at_once(root: Path) -> None:
    first = driver(root)
    next_line(first)
    first.kill()
    first.wait()
    with Study.open(SweepFolder(root, "s")) as study:
        trial = study.ask()
        assert trial.attempt == 2
        study.report(trial, [evaluated(1, 0.5)])
        assert 1 in [p.step for p in study.metric_history(0)]


@pytest.mark.usefixtures("nobody_watches")
def test_who_leaves_makes_room_at_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver_lease, "has_ended", lambda holder: False)  # of another machine nothing is certain
    for _ in range(2):
        with Study.open(SweepFolder(root, "s")) as study:
            study.start_driving()
    with Study.open(SweepFolder(root, "s")) as study:
        assert [e.kind for e in study.events()].count("driver") == 2


def test_the_holder_is_known_by_more_than_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = process_identity.process_id()
    assert process_identity.holder_name(mine) == f"pid {os.getpid()} on {os.uname().nodename}"
    who, _, mark = mine.partition(", process ")
    assert process_identity.has_ended(mine), "a study opened again by its own process"
    assert process_identity.has_ended(f"pid 1 on here, process {mark}"), "another process has that number now"
    assert not process_identity.has_ended(f"{who}, process 0000/pid:[1]/77"), "another machine's"
    assert not process_identity.has_ended("pid 1 on somewhere")


def test_of_many_that_begin_at_once_one_does(fast_tmp_path: Path) -> None:
    spec, folder, count = dump_spec(make_spec(GRID)), SweepFolder(fast_tmp_path, "s"), 20
    together = multiprocessing.get_context("fork").Barrier(count)

    def begin(_: int) -> None:
        together.wait()
        try:
            create_sweep_folder(folder, spec)
        except NameTaken:
            os._exit(2)

    assert sorted(forked_together(count, begin)) == [0] + [2] * (count - 1)
    assert ([p.name for p in fast_tmp_path.iterdir()], folder.spec.read_text()) == (["s"], spec)


def test_a_beat_notices_who_took_over(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Study.open(SweepFolder(root, "s")) as first, Study.open(SweepFolder(root, "s")) as second:
        first.start_driving()
        first.heartbeat()
        second.start_driving()
        monkeypatch.setattr(driver_lease, "HEARTBEAT_SECONDS", 0.0)
        assert not first.fenced
        with pytest.raises(SweepHeld, match="pid"):
            first.heartbeat()
        assert first.fenced


def test_a_fenced_driver_tells_mlflow_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Heard()
    with Study.open(SweepFolder(root, "s")) as first, Study.open(SweepFolder(root, "s")) as second:
        first.start_driving()
        box = Outbox(root / "outbox", seen, fence=first.check_fence)
        box.set_tags("0", {"by": "first"})
        assert seen.queue.get(timeout=LIMIT_SECONDS) == {"by": "first"}
        seen.hold.clear()
        box.set_tags("0", {"by": "first, on its way"})
        assert seen.queue.get(timeout=LIMIT_SECONDS) == {"by": "first, on its way"}
        box.set_tags("0", {"by": "first, not yet delivered"})
        second.start_driving()
        monkeypatch.setattr(driver_lease, "SILENCE_TIMEOUT", 0.0)  # as if it had slept so long
        seen.hold.set()
        with pytest.raises(SweepHeld):
            box.set_tags("0", {"by": "a zombie"})
        assert box.close(LIMIT_SECONDS) == 1
        assert seen.queue.empty(), "what it had told and not delivered waits for whoever resumes here"
        assert "zombie" not in (root / "outbox" / "messages.jsonl").read_text()
        box = Outbox(root / "outbox", seen, fence=second.check_fence)
        assert box.close(LIMIT_SECONDS) == 0
        assert seen.queue.get(timeout=LIMIT_SECONDS) == {"by": "first, not yet delivered"}


class Heard(ListSink):
    """A receiver whose calls can be held up."""

    def __init__(self) -> None:
        super().__init__()
        self.queue: SimpleQueue[Any] = SimpleQueue()
        self.hold = Event()
        self.hold.set()

    def set_tags(self, run: str, tags: Any) -> None:
        self.queue.put(dict(tags))
        assert self.hold.wait(LIMIT_SECONDS)
