"""The service killed at random instants while two sweeps run and three wait: none is lost, doubled or overtaken.

An instant is a random time after something was begun: the end of a sweep, a submission, a change of priority, the death
of a driver, a start of the machine or of the service. What has to follow does not depend on it.
"""

import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from typing import Any

import pytest

from orchestrator.commands.status import status
from orchestrator.service.driver_supervisor import MOST_DEATHS
from orchestrator.service.hosting.queue_location import move_queue, open_queue
from orchestrator.service.sweep_queue import QueueState
from tests.support.postgresql import postgresql_server
from tests.support.processes import environment, wait_until
from tests.support.service_process import RunningService, end_processes, finish, pid_of, service_process, starts

AT_ONCE, QUEUED = 2, 3
KILLS = int(os.environ.get("PREFSWEEP_TEST_KILLS", "20"))
SECONDS = {"submission": 6.0, "start": 3.0}
"""Of what takes longer than a second and a half; a submission starts the process that loads it."""
KINDS = ("end", "priority", "driver", "machine")
SHARE_AT_START = 0.25
"""Of the kills: they hit a service that is just starting."""


@pytest.fixture(params=["sqlite", "postgresql"])
def root(request: pytest.FixtureRequest, fast_tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    for name, value in environment(fast_tmp_path).items():
        monkeypatch.setenv(name, value)
    try:
        if request.param == "sqlite":
            yield fast_tmp_path
        else:
            with postgresql_server() as url:
                move_queue(fast_tmp_path, url)
                yield fast_tmp_path
    finally:
        end_processes(fast_tmp_path)


class Storm:
    """A service under kills, and what must have happened by now."""

    def __init__(self, root: Path, seed: int) -> None:
        self.root, self.queue = root, open_queue(root)
        self._chance, self._boot = random.Random(seed), 0
        self.kills, self.deaths = Counter[str](), Counter[str]()
        self.names, self.running, self.waiting = list[str](), list[str](), list[str]()
        self.begun: list[set[str]] = []
        """Sweeps whose drivers began, in this order; those of one set together."""
        self._priorities, self._kinds = Counter[str](), list[str]()
        self.service = RunningService(root, AT_ONCE, TEST_BOOT="0")

    def fill(self) -> None:
        """Two run, three wait."""
        for _ in range(AT_ONCE):
            self._submission()()
            self._begins(self.waiting.pop())
            self.settle()
        for _ in range(QUEUED):
            self._submission()()
        self.settle()

    def settle(self) -> None:
        """Wait until those run that must, and check that nothing else has begun, is missing or has another place."""
        expected = sum(map(len, self.begun))
        wait_until(
            lambda: (
                len(starts(self.root)) >= expected
                and sorted(sweep.name for sweep in self.queue.sweeps([QueueState.DRIVEN])) == sorted(self.running)
            ),
            lambda: f"{self.begun} and not {starts(self.root)}: {self.queue.sweeps()}\n{self.service.log()}",
        )
        found = iter(starts(self.root))
        assert [{next(found) for _ in names} for names in self.begun] == self.begun
        assert list(found) == [], "more drivers than must have begun"
        assert self.service.queued("waiting") == self.waiting

    def round(self) -> None:
        """Begin something, kill the service, start it again."""
        what = "submission" if len(self.waiting) < QUEUED else self._next_kind()
        if what == "driver" and max(self.deaths[name] for name in self.running) == MOST_DEATHS:
            what = "end"
        pids = {name: pid_of(self.root, name) for name in self.running}
        finally_do = getattr(self, f"_{what}")()
        self._sleep(what)
        self.service.kill()
        self.kills[what] += 1
        if what == "machine":
            self._end_the_machine(pids)
        if self._chance.random() < SHARE_AT_START:
            starting = service_process(self.root, AT_ONCE, TEST_BOOT=str(self._boot))
            self._sleep("start")
            starting.kill()
            starting.communicate()
            self.kills["start"] += 1
        self.service = RunningService(self.root, AT_ONCE, TEST_BOOT=str(self._boot))
        finally_do()
        self.settle()
        again = self.begun[-1] if what in ("driver", "machine") else set[str]()
        kept = {name: pid for name, pid in pids.items() if name in self.running and name not in again}
        assert {name: pid_of(self.root, name) for name in kept} == kept, "they are the drivers of before"

    def end(self) -> None:
        """Let one sweep after the other end, then the service."""
        while self.running:
            self._end()
            self.settle()
        self.service.end()

    def _next_kind(self) -> str:
        """Each of them once, in some order, then again."""
        if not self._kinds:
            self._kinds = self._chance.sample(KINDS, len(KINDS))
        return self._kinds.pop()

    def _sleep(self, what: str) -> None:
        time.sleep(self._chance.uniform(0.0, SECONDS.get(what, 1.5)))

    def _begins(self, name: str) -> None:
        self.begun.append({name})
        self.running.append(name)

    def _request(self, send: Callable[[RunningService], tuple[int, Any]]) -> Callable[[], list[int]]:
        """Send a request while the service is killed; the function sends it again to the next service."""
        answered, service = list[int](), self.service

        def try_it() -> None:
            with suppress(OSError, HTTPException):  # the service was killed
                answered.append(send(service)[0])

        thread = threading.Thread(target=try_it)
        thread.start()

        def again() -> list[int]:
            thread.join()
            return [*answered, send(self.service)[0]]

        return again

    # --- what is under way at a kill; each returns what is done once there is a service again ------------------------

    def _submission(self) -> Callable[[], None]:
        name = f"s{len(self.names):02d}"
        self.names.append(name)
        send = self._request(lambda service: service.submit(name))

        def submitted() -> None:
            assert send() in ([201], [200], [201, 200])  # 200: the service that was killed had stored it
            self.waiting.append(name)
            self._sort()

        return submitted

    def _priority(self) -> Callable[[], None]:
        name, priority = self._chance.choice(self.waiting), self._chance.randint(-3, 3)
        path, body = f"/sweeps/{name}/priority", {"priority": priority}
        send = self._request(lambda service: service.call("POST", path, body))

        def changed() -> None:
            assert set(send()) == {200}
            self._priorities[name] = priority
            self._sort()

        return changed

    def _sort(self) -> None:
        self.waiting.sort(key=lambda name: (-self._priorities[name], name))

    def _end(self) -> Callable[[], None]:
        name = self._chance.choice(self.running)
        finish(self.root, name)
        self.running.remove(name)
        if self.waiting:
            self._begins(self.waiting.pop(0))
        return lambda: None

    def _driver(self) -> Callable[[], None]:
        name = self._chance.choice(self.running)
        os.kill(pid_of(self.root, name), signal.SIGKILL)
        self.deaths[name] += 1
        self.begun.append({name})
        return lambda: None

    def _machine(self) -> Callable[[], None]:
        return lambda: None

    def _end_the_machine(self, pids: dict[str, int]) -> None:
        for pid in pids.values():
            os.killpg(os.getpgid(pid), signal.SIGKILL)
        wait_until(lambda: not any(pid_of(self.root, name) for name in pids))
        self._boot += 1
        self.begun.append(set(pids))


@pytest.mark.faults
def test_killed_twenty_times_it_loses_nothing_and_starts_nothing_twice(
    root: Path, request: pytest.FixtureRequest
) -> None:
    storm, kills = Storm(root, seed=16), KILLS if "sqlite" in request.node.name else max(1, KILLS // 4)
    storm.fill()
    while storm.kills.total() < kills:
        storm.round()
    storm.end()
    found = {sweep.name: (sweep.state, sweep.deaths) for sweep in storm.queue.sweeps()}
    assert found == {name: (QueueState.FINISHED, storm.deaths[name]) for name in storm.names}
    for name in storm.names:
        shown = status(name, root)
        assert (shown["state"], [trial["state"] for trial in shown["trials"]]) == ("finished", ["COMPLETE"] * 2)
    assert "Traceback" not in storm.service.log()
    storm.queue.close()
    hit = ", ".join(f"{count} {what}" for what, count in sorted(storm.kills.items()))
    drivers, rebooted = sum(map(len, storm.begun)), sum(len(names) for names in storm.begun if len(names) > 1)
    print(
        f"kills survived {storm.kills.total()} ({hit}), {len(storm.names)} sweeps, {drivers} drivers, of them "
        f"{storm.deaths.total()} after a death and {rebooted} after a start of the machine: sweeps lost 0, started "
        "twice 0, overtaken 0"
    )
