"""Sweeps of one machine that want its GPUs at the same time, as processes: none ever has one that another has."""

import json
import os
import re
import select
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from orchestrator import gpu_locks
from orchestrator.errors import ExitCode, StorageRefused
from orchestrator.execution.slots import Slots
from orchestrator.gpu_locks import GpuTaken, gpu_holders, holders_text, reserved_gpus, use_own_gpus
from orchestrator.gpus import Gpu
from tests.support.gpu_driver import GpuDriver, machine

NOBODY = 65534
FIRST, SECOND, THIRD = (f"GPU-{i:08x}-0000" for i in range(3))
Start = Callable[..., GpuDriver]


@pytest.fixture
def start(fast_tmp_path: Path) -> Iterator[Start]:
    """Start a driver on a machine with so many GPUs; what is left of all of them is killed."""
    fast_tmp_path.chmod(0o755)  # for another user
    started: list[GpuDriver] = []

    def begin(gpus: int, sweep: str, *arguments: Any, **more: Any) -> GpuDriver:
        driver = GpuDriver(machine(fast_tmp_path, gpus), sweep, *arguments, **more)
        started.append(driver)
        return driver

    yield begin
    for driver in started:
        driver.process.kill()
        driver.process.communicate()


# --- two sweeps ------------------------------------------------------------------------------------------------------


def test_the_second_sweep_takes_what_is_free_and_the_third_waits_for_the_first_that_ends(start: Start) -> None:
    first, second, third = (start(2, name) for name in "abc")
    assert (first.takes(), second.takes()) == ([FIRST], [SECOND])
    third.go()
    a, b = (rf"of \w+ \(pid {driver.process.pid}, since [-\d: ]+\)" for driver in (first, second))
    sentence = third.says("waits")
    expected = rf"waiting for a GPU: 2 of 2 GPUs are in use: GPU 0 by sweep a {a}, GPU 1 by sweep b {b}"
    assert re.fullmatch(expected, sentence), sentence
    second.ends()
    assert third.finally_holds() == [SECOND]


def test_a_sweep_takes_all_free_gpus_that_its_trials_use_and_no_more(start: Start) -> None:
    one, many = start(3, "a"), start(3, "b", 1, 8)
    assert (one.takes(), many.takes()) == ([FIRST], [SECOND, THIRD])


def test_a_trial_on_two_gpus_waits_until_both_are_free_and_holds_none_meanwhile(start: Start) -> None:
    one, two, other = start(2, "a"), start(2, "b", 2, 2), start(2, "c")
    one.takes()
    two.go()
    assert "waiting for 2 GPUs: 1 is free, and a trial needs 2; 1 of 2 GPUs is in use" in two.says("waits")
    assert other.takes() == [SECOND]
    one.ends()
    other.ends()
    assert two.finally_holds() == ["0", "1"], "all of the machine's: the variable stays as the user left it"


def test_without_waiting_it_is_refused_with_the_code_of_a_busy_sweep(start: Start) -> None:
    first, second = start(1, "a"), start(1, "b", 1, 1, "no-wait")
    first.takes()
    second.go()
    refused = second.says("refused")
    assert refused.startswith("1 GPU is in use: GPU 0 by sweep a of ")
    assert "--no-wait" in refused
    assert gpu_locks.GpusBusy.code is ExitCode.LOCKED


def test_drivers_that_start_at_the_same_instant_share_the_gpus_and_none_is_stuck_with_half_of_what_it_needs(
    start: Start,
) -> None:
    drivers = [start(3, f"s{i}", 2, 2) for i in range(4)]
    for driver in drivers:
        driver.go()
    waiting, served = list(drivers), 0
    while waiting:
        said = [driver for driver in waiting if _next(driver) == "holds"]
        for driver in said:
            assert len(said) == 1, "three GPUs serve one trial of two at a time"
            driver.ends()
            waiting.remove(driver)
            served += 1
    assert served == 4


def _next(driver: GpuDriver) -> str:
    """The kind of the next line that a driver has already written; "" where it has written none."""
    assert driver.process.stdout is not None
    if not select.select([driver.process.stdout], [], [], 0.05)[0]:
        return ""
    return next(iter(json.loads(driver.process.stdout.readline())))


# --- drivers that are killed -----------------------------------------------------------------------------------------


def test_a_killed_driver_frees_its_gpu_at_once(start: Start) -> None:
    first, second = start(1, "a"), start(1, "b")
    first.takes()
    second.go()
    assert "sweep a" in second.says("waits")
    first.process.send_signal(signal.SIGKILL)
    assert second.finally_holds() == ["0"]


def test_the_gpu_of_a_killed_driver_is_free_only_after_its_workers_have_ended(start: Start) -> None:
    first, second = start(1, "a", 1, 1, "worker"), start(1, "a")
    first.takes()
    worker = first.says("worker")
    first.process.kill()
    first.process.wait()
    second.go()
    try:
        assert "sweep a of " in (sentence := second.says("waits"))
        assert f"(pid {first.process.pid}, since " in sentence
        assert sentence.endswith("), which has ended: its workers still compute")
    finally:
        os.kill(worker, signal.SIGKILL)
    assert second.finally_holds() == ["0"]


def test_a_worker_that_comes_too_late_does_not_use_what_another_sweep_has_taken(
    start: Start, fast_tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = start(1, "b")
    driver.takes()
    own = {"folder": str(fast_tmp_path / "locks"), "keys": [FIRST], "token": "of the driver that was killed"}
    monkeypatch.setenv(gpu_locks._OWN_LOCKS, json.dumps(own))  # pyright: ignore[reportPrivateUsage]
    with pytest.raises(GpuTaken):
        use_own_gpus()


def test_rays_workers_see_one_of_the_sweeps_gpus_each_and_hold_it_beyond_a_killed_driver(
    start: Start, fast_tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ORCHESTRATE_HOME", str(fast_tmp_path))
    other, driver = start(3, "a"), start(3, "b", 1, 8, "ray")
    assert (other.takes(), driver.takes()) == ([FIRST], [SECOND, THIRD])
    workers = driver.says("ray")
    assert sorted(worker["visible"] for worker in workers) == [SECOND, THIRD]
    stuck = [psutil.Process(worker["pid"]) for worker in workers]
    for worker in stuck:
        worker.suspend()  # as one inside a kernel of CUDA, which answers nobody
    driver.process.kill()
    driver.process.wait()
    again = start(3, "b", 2, 8)
    again.go()
    assert "GPUs 1, 2 by sweep b" in again.says("waits")
    for worker in stuck:
        worker.kill()
    assert again.finally_holds() == [SECOND, THIRD]
    shutil.rmtree((fast_tmp_path / "ray" / "session").read_text())  # as the next driver of the sweep would


# --- who has what ----------------------------------------------------------------------------------------------------


@pytest.fixture
def devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Gpu, ...]:
    """Two GPUs, as seen by this process."""
    monkeypatch.setenv("ORCHESTRATE_GPU_LOCKS", str(tmp_path / "locks"))
    found = tuple(Gpu("nvidia", str(i), uuid, token=uuid) for i, uuid in enumerate((FIRST, SECOND)))
    monkeypatch.setattr(gpu_locks, "visible_devices", lambda: found)
    return found


def _never(sentence: str) -> None:
    raise AssertionError(sentence)


def test_whoever_looks_makes_nothing_and_keeps_nobody_from_a_gpu(devices: tuple[Gpu, ...], tmp_path: Path) -> None:
    assert gpu_holders(devices) == {}
    assert not (tmp_path / "locks").exists()
    with reserved_gpus("a", 1, 1, waits=False, on_wait=_never) as held:
        holders = gpu_holders(devices)
        assert [holder.sweep for holder in holders.values()] == ["a"]
        assert list(holders) == list(held) == [devices[0]]
        assert holders_text(devices, holders).startswith("1 of 2 GPUs is in use: GPU 0 by sweep a of ")
    assert gpu_holders(devices) == {}
    assert holders_text(devices, {}) == ""


def test_a_sweep_on_the_cpu_takes_no_lock_and_sees_no_gpu(
    devices: tuple[Gpu, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with reserved_gpus("a", 0, 0, waits=False, on_wait=_never) as held:
        assert (held, os.environ["CUDA_VISIBLE_DEVICES"]) == ((), "")
        assert not (tmp_path / "locks").exists()
    assert "CUDA_VISIBLE_DEVICES" not in os.environ


@pytest.mark.parametrize("planted", ["link", "folder", "pipe"])
def test_what_somebody_planted_in_place_of_a_lock_is_never_followed_and_its_gpu_counts_as_taken(
    devices: tuple[Gpu, ...], tmp_path: Path, planted: str
) -> None:
    lock, target = tmp_path / "locks" / f"{FIRST}.lock", tmp_path / "mine.txt"
    target.write_text("mine")
    lock.parent.mkdir()
    {"link": lambda: lock.symlink_to(target), "folder": lock.mkdir, "pipe": lambda: os.mkfifo(lock)}[planted]()
    with reserved_gpus("a", 1, 2, waits=False, on_wait=_never) as held:
        assert held == (devices[1],)
        assert f"whose lock {lock} cannot be used" in str(gpu_holders(devices)[devices[0]])
    assert target.read_text() == "mine"


def test_another_users_words_reach_no_terminal_as_they_are(devices: tuple[Gpu, ...], tmp_path: Path) -> None:
    with reserved_gpus("a", 1, 1, waits=False, on_wait=_never):
        lock = tmp_path / "locks" / f"{FIRST}.lock"
        text = json.loads(lock.read_text())
        lock.write_text(json.dumps(text | {"sweep": "\x1b[2Jx" * 99, "user": "\nok"}))
        shown = str(gpu_holders(devices)[devices[0]])
        assert shown.isprintable()
        assert len(shown) < 200
        lock.write_text('{"pid": "torn')
        assert str(gpu_holders(devices)[devices[0]]) == "a sweep that is just starting or ending"


def test_the_lock_of_a_user_who_lets_nobody_read_it_is_said_and_its_gpu_left_alone(
    start: Start, fast_tmp_path: Path
) -> None:
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("only root can be another user")
    first = start(2, "a")
    assert first.takes() == [FIRST]
    folder = fast_tmp_path / "locks"
    assert folder.stat().st_mode & 0o7777 == 0o1777
    assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {0o666}, "whatever the umask of the first user"
    (folder / f"{FIRST}.lock").chmod(0o600)
    # The other user may read what leads to Python in root's home, and write nothing of root's.
    reads = ["--inh-caps=-all,+dac_read_search", "--ambient-caps=+dac_read_search"]
    nobody = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", *reads]
    second, third = start(2, "b", before=nobody), start(2, "c", 1, 1, "no-wait", before=nobody)
    assert second.takes() == [SECOND]
    third.go()
    refused = third.says("refused")
    assert f"GPU 0 by root, whose lock {folder / FIRST}.lock cannot be used (Permission denied)" in refused
    assert "GPU 1 by sweep b of nobody" in refused


def test_a_folder_that_is_no_folder_is_refused_with_the_way_out(devices: tuple[Gpu, ...], tmp_path: Path) -> None:
    (tmp_path / "locks").touch()
    with (
        pytest.raises(StorageRefused, match=r"locks, by which sweeps share .* set ORCHESTRATE_GPU_LOCKS to a folder"),
        reserved_gpus("a", 1, 1, waits=False, on_wait=_never),
    ):
        pass


@pytest.mark.parametrize(
    ("slots", "needed"),
    [
        (Slots(3, 0.0, 1), (0, 0)),
        (Slots(3, 1.0, 1), (1, 3)),
        (Slots(5, 0.5, 1), (1, 3)),
        (Slots(4, 0.3, 1), (1, 2)),
        (Slots(2, 4.0, 1, processes=4), (4, 8)),
        (Slots(8, 0.25, 1, trials_per_process=4), (1, 2)),
        (Slots(8, 0.125, 1, trials_per_process=4), (1, 1)),
    ],
)
def test_a_sweep_holds_the_gpus_of_the_trials_that_run_at_a_time(slots: Slots, needed: tuple[int, int]) -> None:
    assert slots.gpus_needed == needed
