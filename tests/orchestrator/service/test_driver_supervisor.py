"""Drivers outlive the service: killed at any instant it finds them again, starts none twice and keeps the order."""

import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from orchestrator import folders
from orchestrator.commands.status import history, status
from orchestrator.folders import SweepFolder
from orchestrator.gpus import forget_gpus
from orchestrator.service.driver_supervisor import DriverSupervisor, ServiceRuns, interrupt_driver
from orchestrator.service.hosting.queue_location import move_queue, open_queue
from orchestrator.service.sweep_queue import MOST_DEATHS, QueuedSweep, QueueState, SweepQueue
from orchestrator.spec.loading.serialization import dump_spec
from tests.support.gpu_driver import GpuDriver, machine
from tests.support.local_driver import KILLED
from tests.support.processes import wait_until
from tests.support.service_process import driver_command, finish, holder, pid_of, starts
from tests.support.specs import make_spec

SWEEPS = ("a", "b", "c", "d", "e")


@pytest.fixture
def root(service_root: Path) -> Path:
    return service_root


@pytest.fixture
def queue(root: Path, request: pytest.FixtureRequest) -> Iterator[SweepQueue]:
    """In the runs folder, or with the parameter "postgresql" on a server."""
    if getattr(request, "param", "") == "postgresql":
        move_queue(root, request.getfixturevalue("new_postgresql")())
    queue = open_queue(root)
    yield queue
    queue.close()


in_both_databases = pytest.mark.parametrize("queue", ["sqlite", "postgresql"], indirect=True)


def submit(queue: SweepQueue, root: Path, *names: str, **more: int) -> None:
    for name in names:
        queue.submit(name, dump_spec(make_spec(2, name=name)), root / name, owner="ann", **more)


def service(root: Path, at_once: int = 2, **more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.support.service_process", "service", str(root), str(at_once)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | more)


def states(queue: SweepQueue) -> dict[str, str]:
    return {sweep.name: sweep.state.value for sweep in queue.sweeps()}


def until(supervisor: DriverSupervisor, event: Callable[[], object]) -> None:
    """Let the service work until the event."""

    def stepped() -> object:
        supervisor.step()
        return event()

    wait_until(stepped)


@in_both_databases
def test_a_killed_service_finds_its_drivers_and_keeps_the_order(root: Path, queue: SweepQueue) -> None:
    submit(queue, root, *SWEEPS)
    queue.set_priority("e", 1)
    first = service(root)
    wait_until(lambda: len(starts(root)) == 2)
    drivers = {name: pid_of(root, name) for name in ("e", "a")}
    first.kill()
    first.wait()
    assert {name: pid_of(root, name) for name in drivers} == drivers, "they outlive the service"

    second = service(root)
    assert second.stdout is not None
    assert second.stdout.readline() == "serves\n"
    with pytest.raises(ServiceRuns, match=f"pid {second.pid}"):
        DriverSupervisor(root, queue)
    finish(root, "e")
    wait_until(lambda: starts(root)[2:] == ["b"])
    assert pid_of(root, "a") == drivers["a"]
    second.kill()
    second.wait()
    finish(root, *SWEEPS)  # one ends while no service looks
    wait_until(lambda: holder(root, "a") is None and holder(root, "b") is None)
    third = service(root, at_once=1)
    wait_until(lambda: set(states(queue).values()) == {"finished"})
    begun = starts(root)
    assert (sorted(begun[:2]), begun[2:]) == (["a", "e"], ["b", "c", "d"]), "each once, in the queue's order"
    assert {status(name, root)["state"] for name in SWEEPS} == {"finished"}
    actions = history("a", root)["queue"]
    assert [(action["person"], action["action"]) for action in actions] == [
        ("ann", "submitted with priority 0"),
        ("the service", "started"),
        ("the service", "found its driver running, and adopted it"),
        ("the service", "finished"),
    ]
    third.kill()
    third.wait()


@in_both_databases
@pytest.mark.parametrize("failpoint", ["service.launch", "service.launched"])
def test_killed_while_it_starts_a_driver_it_starts_one(root: Path, queue: SweepQueue, failpoint: str) -> None:
    submit(queue, root, "a")
    assert service(root, ORCHESTRATE_FAILPOINT=failpoint).wait() == KILLED
    again = service(root)
    wait_until(lambda: starts(root))
    finish(root, "a")
    wait_until(lambda: states(queue)["a"] == "finished")
    again.kill()
    again.wait()
    assert (starts(root), queue.find("a").deaths) == (["a"], 0)


@pytest.fixture
def supervisor(root: Path, queue: SweepQueue) -> Iterator[DriverSupervisor]:
    supervisor = DriverSupervisor(root, queue, at_once=1, command=driver_command)
    yield supervisor
    supervisor.close()


@in_both_databases
def test_a_driver_that_dies_is_resumed_a_few_times_before_any_other(
    root: Path, queue: SweepQueue, supervisor: DriverSupervisor
) -> None:
    submit(queue, root, "a", "b")
    queue.set_priority("b", -1)
    for number in range(1, MOST_DEATHS + 2):
        until(supervisor, lambda number=number: len(starts(root)) == number and holder(root, "a"))
        queue.set_priority("b", 5) if queue.find("b").priority < 0 else None
        os.kill(pid_of(root, "a"), signal.SIGKILL)
    until(supervisor, lambda: queue.find("a").state is QueueState.STOPPED)
    assert queue.find("a").why == "4 drivers ended unexpectedly, the last: the driver was ended by signal 9"
    until(supervisor, lambda: "b" in starts(root))
    assert starts(root) == ["a"] * (MOST_DEATHS + 1) + ["b"]


def test_a_driver_that_refuses_is_not_started_again(
    root: Path, queue: SweepQueue, supervisor: DriverSupervisor
) -> None:
    submit(queue, root, "a")
    (root / "a.code").write_text("2")
    until(supervisor, lambda: queue.find("a").state.has_ended)
    found = queue.find("a")
    assert (found.state, found.why, found.launch) == (QueueState.FAILED, "a cannot be trained", 1)
    (root / "a.code").unlink()
    queue.resume("a")
    finish(root, "a")
    until(supervisor, lambda: queue.find("a").state is QueueState.FINISHED)


@in_both_databases
def test_after_a_start_of_the_machine_what_ran_is_resumed(
    root: Path, queue: SweepQueue, supervisor: DriverSupervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit(queue, root, "a", "b")
    until(supervisor, lambda: starts(root))
    os.kill(pid_of(root, "a"), signal.SIGKILL)
    monkeypatch.setattr(folders, "boot_id", lambda: "the next")
    until(supervisor, lambda: len(starts(root)) == 2)
    assert starts(root) == ["a", "a"]
    assert (queue.find("a").deaths, queue.find("a").why) == (0, "the machine was started again")


def test_a_driver_that_is_stopped_while_python_starts_is_not_resumed(root: Path, queue: SweepQueue) -> None:
    """Then Python ends with the code of an error, as a driver that died does."""
    program = "import signal, sys; signal.signal(2, lambda *_: sys.exit(1)); print('here', flush=True); signal.pause()"
    supervisor = DriverSupervisor(root, queue, command=lambda _: [sys.executable, "-c", program])
    submit(queue, root, "a")
    log = SweepFolder(root, "a").log
    until(supervisor, lambda: log.is_file() and "here" in log.read_text())
    assert interrupt_driver(root, queue.find("a"))
    until(supervisor, lambda: queue.find("a").state.has_ended)
    found = queue.find("a")
    assert (found.state, found.why, found.deaths) == (QueueState.STOPPED, "stopped before its first trial", 0)
    supervisor.close()


def test_a_sweep_waits_for_gpus_of_others_and_is_not_overtaken(
    root: Path,
    queue: SweepQueue,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    for name, value in machine(tmp_path, 2).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    request.addfinalizer(forget_gpus)
    forget_gpus()
    supervisor = DriverSupervisor(root, queue, at_once=3, command=driver_command)
    plain = GpuDriver(dict(os.environ), "plain", 1, 1)
    request.addfinalizer(plain.process.kill)
    assert len(plain.takes()) == 1
    submit(queue, root, "a", gpus=2)
    submit(queue, root, "b", gpus=1)
    for _ in range(3):
        supervisor.step()
    assert set(states(queue).values()) == {"waiting"}, "one GPU is free; the first sweep needs two"
    plain.process.kill()
    plain.process.wait()
    until(supervisor, lambda: starts(root))
    supervisor.step()
    assert states(queue) == {"a": "driven", "b": "waiting"}, "its driver has not taken its GPUs yet"
    supervisor.close()


def test_a_command_line_sweep_of_the_queue_trains(root: Path, queue: SweepQueue) -> None:
    """The command of the drivers is the one that a person types."""
    supervisor = DriverSupervisor(root, queue)
    submit_real(queue, root)
    until(supervisor, lambda: queue.find("s").state.has_ended)
    found: QueuedSweep = queue.find("s")
    assert found.state is QueueState.FINISHED, SweepFolder(root, "s").log.read_text()
    assert Counter(trial["state"] for trial in status("s", root)["trials"]) == {"COMPLETE": 1}
    supervisor.close()


def submit_real(queue: SweepQueue, root: Path) -> None:
    from tests.support.specs import real_spec

    queue.submit("s", dump_spec(real_spec(steps=2)), root / "s", owner="ann")
