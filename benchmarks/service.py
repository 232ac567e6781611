"""The service while a team watches: `python -m benchmarks.service --write`, three minutes; `--small` in seconds.

Four processes on one machine: the service over 1,000 finished sweeps and one that runs; that sweep's driver, 64 trials
of which each reports once a second to the real study; 50 viewers of the sweep's page, who follow its events and ask for
changed panels as the page's script does; and one more person who opens pages and lists in turn, whose waits are
measured. The driver reports first without viewers, then with them. An event's delay runs from before its report to the
viewer's receipt of it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from benchmarks import results
from benchmarks.driver import spec_of
from benchmarks.finished_sweeps import FIRST, copy, finish, metrics_of
from orchestrator.folders import SweepFolder, create_sweep_folder, sweep_lock
from orchestrator.service.access_tokens import AccessTokens, Role
from orchestrator.service.driver_supervisor import SERVICE_FOLDER
from orchestrator.spec.loading.serialization import dump_spec
from orchestrator.spec.pruners import NoPruner
from orchestrator.study.study import Study
from orchestrator.study.trial_records import Trial
from trainer.results import StepMetrics

RUNNING = "running"
SENT = "sent_at"
"""A metric with the time of its report, in seconds since 1970."""
PAGES = {
    "list of sweeps": "/",
    "running sweep": f"/sweeps/{RUNNING}",
    "trial of it": f"/sweeps/{RUNNING}/trials/1",
    "finished sweep": "/sweeps/finished-{number:04d}",
    "two sweeps compared": f"/compare?name={FIRST}&name=finished-{{number:04d}}",
    "GET /sweeps, 200 of them": "/api/v1/sweeps?limit=200&sort=-age",
    "GET /sweeps, all at once": "/api/v1/sweeps?limit=5000",
    "GET /sweeps/NAME": f"/api/v1/sweeps/{RUNNING}",
}
ALL_SWEEPS = "GET /sweeps, all pages"
DEBOUNCE_SECONDS = 0.15
"""As of the page's script."""


@dataclass(frozen=True)
class Load:
    """What is measured."""

    sweeps: int = 1000
    viewers: int = 50
    slots: int = 64
    alone: float = 25.0
    """Seconds of reports without viewers."""
    watched: float = 75.0
    """Seconds of reports with viewers."""
    trials: int = 12
    """Of a finished sweep."""


Reports = list[tuple[float, float, float]]
"""Of each report: when, and the seconds that it took, by the clock and of the driver's processor."""
SMALL = Load(sweeps=12, viewers=3, slots=4, alone=2.0, watched=8.0, trials=2)


def main() -> None:
    """Measure and print; as a child, be the service or the driver."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write the figures into docs/performance.md")
    parser.add_argument("--small", action="store_true", help="few of everything, for seconds")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        kind, root, argument = options.child
        {"serve": serve, "drive": drive}[kind](Path(root), argument)
        return
    found = measure(SMALL if options.small else Load())
    print(json.dumps(found, indent=1))
    if options.write:
        results.write("service", found)


# --- the service and the driver, each a process -----------------------------------------------------------------------


def serve(root: Path, _: str) -> None:
    """Be the service; the first line has its port."""
    import uvicorn

    from orchestrator.service.http_app import Service

    service = Service(root)
    with socket.create_server(("127.0.0.1", 0), backlog=512) as listener:
        print(listener.getsockname()[1], flush=True)
        config = uvicorn.Config(service.app, log_level="warning", timeout_graceful_shutdown=1)
        uvicorn.Server(config).run(sockets=[listener])


def drive(root: Path, slots: str) -> None:
    """Report for every slot once a second, spread over it, until stdin ends; then print each report's time and cost."""
    folder, number = SweepFolder(root, RUNNING), int(slots)
    spec = spec_of(number, number).model_copy(update={"name": RUNNING, "pruner": NoPruner()})
    create_sweep_folder(folder, dump_spec(spec))
    ends = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), ends.set()), daemon=True).start()
    made: Reports = []
    with sweep_lock(folder), Study.create(folder, spec, slots=number) as study:
        study.start_driving()
        trials = [trial for _ in range(number) if isinstance(trial := study.ask(), Trial)]
        print("drives", flush=True)
        began = time.monotonic()
        for position in count():
            if ends.wait(max(0.0, began + position / number - time.monotonic())):
                break
            step, trial = position // number, trials[position % number]
            values, at = metrics_of(step, trial.number / number), time.time()
            wall, cpu = time.perf_counter(), time.thread_time()
            counted, _ = study.report(trial, [StepMetrics(step, values | {SENT: at})])
            assert counted, "the trial was stopped"
            made.append((at, time.perf_counter() - wall, time.thread_time() - cpu))
    print(json.dumps(made))


def child(kind: str, root: Path, argument: str) -> subprocess.Popen[str]:
    """Start the service or the driver."""
    command = [sys.executable, "-m", "benchmarks.service", "--child", kind, str(root), argument]
    env = os.environ | {"ORCHESTRATE_HOME": str(root), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)


def line_of(process: subprocess.Popen[str]) -> str:
    """Return the next line that a child prints. Raises RuntimeError: it has ended."""
    assert process.stdout is not None
    found = process.stdout.readline().strip()
    if not found:
        raise RuntimeError(f"{process.args} ended with {process.wait()}")
    return found


# --- those who look ---------------------------------------------------------------------------------------------------


class Connection:
    """A browser's connection, kept open."""

    def __init__(self, port: int, token: str) -> None:
        self._port, self._token = port, token
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def open(self, path: str) -> tuple[dict[str, str], asyncio.StreamReader]:
        """Send a request; return the headers of the answer and the stream after them."""
        request = f"GET {path} HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {self._token}\r\n\r\n".encode()
        while True:
            is_new = self._streams is None
            if self._streams is None:
                self._streams = await asyncio.open_connection("127.0.0.1", self._port, limit=1 << 26)
            reader, writer = self._streams
            try:
                writer.write(request)
                head = await reader.readuntil(b"\r\n\r\n")
                break
            except (
                ConnectionError,
                asyncio.IncompleteReadError,
            ):  # one that was not used for seconds is closed
                self.close()
                if is_new:
                    raise
        status, *lines = head.decode().strip().split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        if status.split()[1] != "200":
            raise RuntimeError(f"{path}: {status} {await reader.readexactly(int(headers['content-length']))!r}")
        return headers, reader

    async def get(self, path: str) -> bytes:
        headers, reader = await self.open(path)
        return await reader.readexactly(int(headers["content-length"]))

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


@dataclass
class Seen:
    """What viewers and the person who opens pages have received."""

    delays: list[float] = field(default_factory=list[float])
    curves: list[float] = field(default_factory=list[float])
    """Seconds between two changes of a viewer's learning curves."""
    panels: list[float] = field(default_factory=list[float])
    """Seconds of a request for changed panels."""
    pages: dict[str, list[float]] = field(default_factory=lambda: defaultdict[str, list[float]](list))
    bytes: int = 0
    round_ended: asyncio.Event = field(default_factory=asyncio.Event)
    """Set once every page was opened."""
    refused: list[str] = field(default_factory=list[str])
    """Messages of the service that it could not read the sweep, or that a viewer has to begin anew."""
    numbers: dict[int, list[float]] = field(default_factory=lambda: defaultdict[int, list[float]](list))
    """By viewer: the times of report of the points received, to tell that none is lost and none doubled."""


_SENT = re.compile(rb'"%s":([0-9.]+)' % SENT.encode())
_PANEL = re.compile(r'<section id="([\w-]+)" data-digest="(\w+)"')
_CHANGED = re.compile(rb'\{"key": "([\w-]+)", "title": "[^"]*", "digest": "(\w+)"')
"""Regular expressions: parsing all JSON of 50 browsers in one process would be what is measured."""


async def view(number: int, port: int, token: str, seen: Seen, is_open: asyncio.Semaphore) -> None:
    """Open the page of the running sweep, follow its events, and ask for changed panels as sweep.js does."""
    page, stream = Connection(port, token), Connection(port, token)
    news, has, changed = asyncio.Event(), dict[str, str](), time.monotonic()

    async def refresh() -> None:
        nonlocal changed
        rest = 0.0
        while True:
            await news.wait()
            await asyncio.sleep(max(DEBOUNCE_SECONDS, rest - time.monotonic()))
            news.clear()
            query = "&".join(f"have={digest}" for digest in has.values())
            began = time.monotonic()
            content = await page.get(f"/sweeps/{RUNNING}/panels?{query}")
            now, head = time.monotonic(), json.loads(content[: content.index(b', "keys": [')] + b"}")
            seen.panels.append(now - began)
            seen.bytes += len(content)
            rest = now + head["rest"] + random.random() / 2
            for key, digest in _CHANGED.findall(content):
                has[key.decode()] = digest.decode()
                if key == b"curves":
                    seen.curves.append(now - changed)
                    changed = now
            if head["again"]:
                news.set()

    async def follow() -> None:
        _, reader = await stream.open(f"/api/v1/sweeps/{RUNNING}/events")
        kind = b""
        async for line in reader:
            if line.startswith(b"event: "):
                kind = line[7:].strip()
            elif line.startswith(b"data: "):
                if kind == b"problem" or (kind == b"reload" and number in seen.numbers):
                    seen.refused.append(f"{kind.decode()}: {line.decode()}")
                now = time.time()
                if number not in seen.numbers:  # the first message has the state, what is reported later follows
                    is_open.release()
                sent = [float(each) for each in _SENT.findall(line)]
                seen.numbers[number] += sent
                seen.delays += [now - each for each in sent]
                news.set()

    try:
        has.update(_PANEL.findall((await page.get(f"/sweeps/{RUNNING}")).decode()))
        async with asyncio.TaskGroup() as group:
            group.create_task(refresh())
            group.create_task(follow())
    finally:
        page.close()
        stream.close()


async def open_pages(port: int, token: str, sweeps: int, seen: Seen) -> None:
    """Open one page after the other, as a person does, and list all sweeps."""
    person = Connection(port, token)
    try:
        for turn in count():
            for what, path in PAGES.items():
                began = time.perf_counter()
                await person.get(path.format(number=1 + turn % (sweeps - 1)))
                seen.pages[what].append(time.perf_counter() - began)
                await asyncio.sleep(0.2)
            began, after, listed = time.perf_counter(), "", 0
            while True:
                found = json.loads(await person.get(f"/api/v1/sweeps?limit=200&after={after}"))
                listed += len(found["sweeps"])
                if (after := found["next"]) is None:
                    break
            assert listed == sweeps + 1
            seen.pages[ALL_SWEEPS].append(time.perf_counter() - began)
            seen.round_ended.set()
    finally:
        person.close()


async def watch(
    port: int, people: Sequence[str], me: str, load: Load, process: psutil.Process, driver: subprocess.Popen[str]
) -> tuple[Seen, dict[str, Any], Reports]:
    """Look for `load.watched` seconds; return what was seen, what the service used meanwhile, and the reports."""
    seen, is_open = Seen(), asyncio.Semaphore(0)
    tasks = [asyncio.create_task(view(k, port, token, seen, is_open)) for k, token in enumerate(people)]

    async def beside(waits: Awaitable[Any], limit: float) -> Any:
        """Wait while the viewers look; the first one that fails ends it."""
        waiting = asyncio.ensure_future(waits)
        done, _ = await asyncio.wait([waiting, *tasks], timeout=limit, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            return task.result()
        raise TimeoutError(f"not done in {limit} s")

    async def open_all() -> None:
        for _ in people:
            await is_open.acquire()

    async def received(last: float) -> None:
        while any(last not in times[-1000:] for times in seen.numbers.values()):
            await asyncio.sleep(0.1)

    try:
        await beside(open_all(), 120)
        first, cpu, at = time.time(), cpu_of(process), time.monotonic()
        tasks.append(asyncio.create_task(open_pages(port, me, load.sweeps, seen)))
        await beside(asyncio.gather(asyncio.sleep(load.watched), seen.round_ended.wait()), load.watched + 300)
        used = {
            "from": first,
            "to": time.time(),
            "cores": round((cpu_of(process) - cpu) / (time.monotonic() - at), 3),
            "mb": round(process.memory_info().rss / 1e6),
        }
        ended = await beside(asyncio.to_thread(driver.communicate, ""), 120)
        made = json.loads(ended[0])
        await beside(received(made[-1][0]), 120)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return seen, used, made


# --- the measurement --------------------------------------------------------------------------------------------------


def cpu_of(process: psutil.Process) -> float:
    return sum(process.cpu_times()[:2])


def measure(load: Load) -> dict[str, Any]:
    """Return the figures, times in milliseconds unless they say otherwise."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as place:
        root = Path(place)
        first = finish(root, load.trials)
        for number in range(1, load.sweeps):
            copy(first, number)
        tokens = AccessTokens(root / SERVICE_FOLDER)
        people = [tokens.create(f"viewer-{number}", Role.VIEWER) for number in range(load.viewers)]
        began = time.monotonic()
        server = child("serve", root, "")
        driver: subprocess.Popen[str] | None = None
        try:
            port = int(line_of(server))
            found: dict[str, Any] = {"seconds_until_it_listens": round(time.monotonic() - began, 2)}
            me, process = tokens.machine_token(), psutil.Process(server.pid)
            began = time.monotonic()
            asyncio.run(_once(port, me))
            found["seconds_of_the_first_list"] = round(time.monotonic() - began, 2)
            found["mb_without_viewers"] = round(process.memory_info().rss / 1e6)
            driver = child("drive", root, str(load.slots))
            line_of(driver)
            time.sleep(load.alone)
            viewers_come = time.time()
            seen, used, made = asyncio.run(watch(port, people, me, load, process, driver))
        finally:
            for each in filter(None, (driver, server)):
                each.terminate()
                each.wait()
    alone = [each for each in made[load.slots :] if each[0] < viewers_come]
    watched = [each for each in made if used["from"] <= each[0] < used["to"]]
    return {
        "sweeps": load.sweeps,
        "trials_of_a_sweep": load.trials,
        "viewers": load.viewers,
        "slots": load.slots,
        "seconds": round(used["to"] - used["from"], 1),
        **found,
        "event": of_ms(seen.delays),
        **lost_and_doubled(seen, [each[0] for each in made if each[0] >= used["from"]]),
        "seconds_between_changes_of_curves": {k: v / 1e3 for k, v in of_ms(seen.curves).items()},
        "panels": of_ms(seen.panels),
        "pages": {what: of_ms(times) for what, times in seen.pages.items()},
        "cores": used["cores"],
        "mb": used["mb"],
        "refused": sorted({text[:200] for text in seen.refused}),
        "sent_kb_a_second": round(seen.bytes / 1e3 / (used["to"] - used["from"])),
        "report_alone": {"wall": of_ms([each[1] for each in alone]), "cpu": of_ms([each[2] for each in alone])},
        "report_watched": {"wall": of_ms([each[1] for each in watched]), "cpu": of_ms([each[2] for each in watched])},
    }


async def _once(port: int, token: str) -> None:
    connection = Connection(port, token)
    await connection.get("/api/v1/sweeps?limit=1")
    connection.close()


def lost_and_doubled(seen: Seen, made: Sequence[float]) -> dict[str, int]:
    """Count over all viewers which reports did not come, and which came twice."""
    lost = sum(len(set(made).difference(times)) for times in seen.numbers.values())
    doubled = sum(len(times) - len(set(times)) for times in seen.numbers.values())
    return {"reports": len(made), "lost": lost, "doubled": doubled}


def of_ms(seconds: Sequence[float]) -> dict[str, float]:
    """Return number, median, 95th percentile and maximum, in milliseconds."""
    ordered = sorted(seconds)
    if not ordered:
        return {"count": 0}
    return {
        "count": len(ordered),
        "median": round(1e3 * median(ordered), 2),
        "p95": round(1e3 * ordered[int(0.95 * (len(ordered) - 1))], 2),
        "max": round(1e3 * ordered[-1], 2),
    }


if __name__ == "__main__":
    main()
