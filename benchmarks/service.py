"""The service under load: `python -m benchmarks.service`.

A runs folder of 1,000 finished sweeps, and one that a driver runs with 64 trials, each of which reports once a second.
First the driver alone, then with 50 viewers of its stream of events, who also load the list and the sweep's status in
turn. Measured are the time from a report to each viewer, of the list and of the status, CPU and memory of the service,
and the time of a report for the driver.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import closing
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from benchmarks.driver import OBJECTIVE, spec_of
from orchestrator.folders import SweepFolder, create_sweep_folder, sweep_lock
from orchestrator.spec.loading.serialization import dump_spec
from orchestrator.study.database.tables import METADATA
from orchestrator.study.study import Study
from orchestrator.study.trial_records import Outcome, Trial, TrialState
from trainer.results import StepMetrics

NAMES = [f"rewards/metric_{number}" for number in range(25)]
SENT = "sent_at"
"""A metric with the time of its report, in seconds since 1970."""


def main() -> None:
    """Measure, and print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--sweeps", type=int, default=1000)
    parser.add_argument("--viewers", type=int, default=50)
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60.0)
    options = parser.parse_args()
    if options.child is not None:
        serve(Path(options.child[1]))
        return
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        os.environ["ORCHESTRATE_HOME"] = folder
        first = finish(root, "finished-0000")
        for number in range(1, options.sweeps):
            copy(first, SweepFolder(root, f"finished-{number:04d}"))
        print(json.dumps(measure(root, options), indent=1))


def finish(root: Path, name: str) -> SweepFolder:
    """Make a sweep of two trials that have ended."""
    spec = spec_of(2, 2).model_copy(update={"name": name})
    folder = SweepFolder(root, name)
    create_sweep_folder(folder, dump_spec(spec))
    with Study.create(folder, spec) as study:
        while isinstance(trial := study.ask(), Trial):
            study.report(trial, [StepMetrics(1, {OBJECTIVE: 0.5 + 0.1 * trial.number})])
            study.tell(trial, Outcome(TrialState.COMPLETE))
    return folder


def copy(first: SweepFolder, to: SweepFolder) -> None:
    """Make another sweep with the same trials, in a tenth of the time."""
    to.path.mkdir()
    to.spec.write_text(first.spec.read_text(encoding="utf-8").replace(first.name, to.name), encoding="utf-8")
    with closing(sqlite3.connect(first.database)) as source, closing(sqlite3.connect(to.database)) as target:
        source.backup(target)
        target.execute("update studies set study_name = ?", (to.name,))
        target.execute("update prefsweep_spec set spec = replace(spec, ?, ?)", (first.name, to.name))
        for table in METADATA.sorted_tables:
            target.execute(f"update {table.name} set sweep = ?", (to.name,))
        target.commit()


def serve(root: Path) -> None:
    """Be the service; the first line has its port and token."""
    import socket

    import uvicorn

    from orchestrator.service.http_app import Service

    service = Service(root)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(json.dumps([listener.getsockname()[1], service.tokens.machine_token()]), flush=True)
        config = uvicorn.Config(service.app, log_level="warning", timeout_graceful_shutdown=1)
        uvicorn.Server(config).run(sockets=[listener])


class Driver(threading.Thread):
    """Reports of all slots once a second, spread over it; `seconds` of each report."""

    def __init__(self, root: Path, slots: int) -> None:
        super().__init__(daemon=True)
        self.folder = SweepFolder(root, "running")
        spec = spec_of(slots, slots).model_copy(update={"name": "running"})
        create_sweep_folder(self.folder, dump_spec(spec))
        self.study, self.slots = Study.create(self.folder, spec), slots
        self.seconds: list[float] = []
        self.ends = threading.Event()

    def run(self) -> None:
        """Drive until `ends`."""
        with sweep_lock(self.folder), self.study as study:
            trials = [trial for _ in range(self.slots) if isinstance(trial := study.ask(), Trial)]
            began = time.monotonic()
            for count in range(10**9):
                due = began + count / self.slots
                if self.ends.wait(max(0.0, due - time.monotonic())):
                    return
                trial, now = trials[count % self.slots], time.time()
                values = dict.fromkeys(NAMES, 0.5) | {SENT: now, OBJECTIVE: 0.5}
                before = time.perf_counter()
                study.report(trial, [StepMetrics(count // self.slots + 1, values)])
                self.seconds.append(time.perf_counter() - before)


def measure(root: Path, options: Any) -> dict[str, Any]:
    """Return the figures."""
    command = [sys.executable, "-m", "benchmarks.service", "--child", "serve", str(root)]
    began = time.monotonic()
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        port, token = json.loads(server.stdout.readline())
        started = time.monotonic() - began
        driver = Driver(root, options.slots)
        driver.start()
        time.sleep(options.seconds / 2)
        alone = driver.seconds[-options.slots * 10 :]
        process = psutil.Process(server.pid)
        cpu, at = sum(process.cpu_times()[:2]), time.monotonic()
        first = len(driver.seconds)
        found = asyncio.run(watch(port, token, options))
        busy = (sum(process.cpu_times()[:2]) - cpu) / (time.monotonic() - at)
        memory = process.memory_info().rss
        driver.ends.set()
        driver.join()
    finally:
        server.terminate()
        server.wait()
    return {
        "sweeps": options.sweeps,
        "viewers": options.viewers,
        "slots": options.slots,
        "seconds until it listens": round(started, 2),
        **found,
        "cores of the service": round(busy, 3),
        "MB of the service": round(memory / 1e6),
        "ms of a report alone": of_ms(alone),
        "ms of a report with viewers": of_ms(driver.seconds[first:]),
    }


async def watch(port: int, token: str, options: Any) -> dict[str, Any]:
    """Watch as many viewers; return the delays of events and the times of pages."""
    delays, lists, statuses = list[float](), list[float](), list[float]()
    viewers = [asyncio.create_task(view(port, token, delays)) for _ in range(options.viewers)]
    until = time.monotonic() + options.seconds
    while time.monotonic() < until:
        for path, times in (("sweeps?limit=200&sort=-age", lists), ("sweeps/running", statuses)):
            before = time.perf_counter()
            _, reader, writer = await ask(port, token, path)
            await reader.read()
            writer.close()
            times.append(time.perf_counter() - before)
        await asyncio.sleep(1.0)
    for viewer in viewers:
        viewer.cancel()
    await asyncio.gather(*viewers, return_exceptions=True)
    return {
        "points that viewers received": len(delays),
        "ms from a report to a viewer": of_ms(delays),
        "ms of the list": of_ms(lists),
        "ms of the status": of_ms(statuses),
    }


async def ask(port: int, token: str, path: str) -> tuple[int, asyncio.StreamReader, asyncio.StreamWriter]:
    """Send a request; return the status and the connection after the head of the answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 24)
    head = (
        f"GET /api/v1/{path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\nauthorization: Bearer {token}\r\n\r\n"
    )
    writer.write(head.encode())
    status = int((await reader.readuntil(b"\r\n\r\n")).split()[1])
    if status != 200:
        raise RuntimeError(f"{path}: {status}, {await reader.read()}")
    return status, reader, writer


async def view(port: int, token: str, delays: list[float]) -> None:
    """Read the stream of the running sweep for as long as it is watched."""
    _, reader, writer = await ask(port, token, "sweeps/running/events")
    try:
        kind = ""
        async for line in reader:
            if line.startswith(b"event: "):
                kind = line.decode().split()[1]
            elif line.startswith(b"data: ") and kind == "metrics":
                now = time.time()
                delays += [now - point["metrics"][SENT] for point in json.loads(line[6:])["points"]]
    finally:
        writer.close()


def of_ms(seconds: list[float]) -> dict[str, float]:
    """Return median, 95th percentile and maximum in milliseconds."""
    ordered = sorted(seconds)
    return {
        "median": round(1e3 * median(ordered), 2),
        "p95": round(1e3 * ordered[int(0.95 * (len(ordered) - 1))], 2),
        "max": round(1e3 * ordered[-1], 2),
    }


if __name__ == "__main__":
    main()
