"""A service and its drivers as processes that tests may kill: `service|http ROOT AT_ONCE` or `driver FILE`.

A driver has the sweep's real lock, study and lease, and trains nothing: it ends when its sweep's name is in the file
`enough`, or with the exit code in the file `NAME.code`. While there is a file `NAME.prepares` it has no study yet.
$TEST_BOOT stands for the machine's boot id, $TEST_BUSY for the seconds that a change of the queue waits for the
database's lock.
"""

import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from orchestrator import folders
from orchestrator.errors import ExitCode
from orchestrator.folders import SweepFolder, create_sweep_folder, lock_holder, runs_folder
from orchestrator.service import queue_tables
from orchestrator.service.driver_supervisor import DriverSupervisor
from orchestrator.service.hosting.queue_location import open_queue
from orchestrator.spec.loading.loader import load_spec
from orchestrator.spec.loading.serialization import dump_spec
from orchestrator.study.study import Study
from orchestrator.study.trial_records import Trial
from tests.support.metrics import COMPLETE, evaluated
from tests.support.processes import LIMIT_SECONDS, environment, wait_until
from tests.support.specs import make_spec


def driver_command(file: Path) -> list[str]:
    return [sys.executable, "-m", "tests.support.service_process", "driver", str(file)]


def starts(root: Path) -> list[str]:
    """The sweep of each driver that has begun."""
    return (root / "starts").read_text().split() if (root / "starts").exists() else []


def finish(root: Path, *names: str) -> None:
    """Let the drivers of these sweeps end."""
    with (root / "enough").open("a") as enough:
        enough.write(" ".join(names) + "\n")


def holder(root: Path, name: str) -> str | None:
    return lock_holder(SweepFolder(root, name))


def pid_of(root: Path, name: str) -> int:
    """Of the sweep's driver; 0 where there is none."""
    return int((holder(root, name) or "pid 0").split()[1])


def end_processes(root: Path) -> None:
    """Kill what a test left running in its folder."""
    for process in psutil.process_iter(["cmdline"]):
        if str(root) in " ".join(process.info["cmdline"] or ()) and process.pid != os.getpid():
            process.kill()


def serve(root: Path, at_once: int) -> None:
    """A service's loop, without its pages."""
    supervisor = DriverSupervisor(root, open_queue(root), at_once=at_once, command=driver_command)
    print("serves", flush=True)
    while True:
        supervisor.step()
        time.sleep(0.05)


def listen(root: Path, at_once: int) -> None:
    """A whole service on a free port of this machine; its first line has the port and the machine's token."""
    import uvicorn

    from orchestrator.service import http_app, sweep_watchers

    sweep_watchers.POLL_SECONDS = 0.02
    http_app.DriverSupervisor = partial(DriverSupervisor, command=driver_command)
    http_app.STEP_SECONDS = 0.1
    service = http_app.Service(root, at_once=at_once)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(json.dumps([listener.getsockname()[1], service.tokens.machine_token()]), flush=True)
        config = uvicorn.Config(service.app, log_level="warning", timeout_graceful_shutdown=1)
        uvicorn.Server(config).run(sockets=[listener])


def service_process(root: Path, at_once: int = 1, **more: str) -> subprocess.Popen[str]:
    """A whole service that is just starting; what it logs is added to the file `service.log`."""
    command = [sys.executable, "-m", "tests.support.service_process", "http", str(root), str(at_once)]
    with (root / "service.log").open("a") as log:
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment(root, **more))


class RunningService:
    """A service in a process of its own, and a client of it, as the machine's owner."""

    def __init__(self, root: Path, at_once: int = 1, **more: str) -> None:
        self._root = root
        self.process = service_process(root, at_once, **more)
        assert self.process.stdout is not None
        first = self.process.stdout.readline()
        assert first, self.log()
        self.port, self.token = json.loads(first)
        self.url = f"http://127.0.0.1:{self.port}"

    def end(self) -> None:
        self.process.terminate()
        self.process.wait(LIMIT_SECONDS)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(LIMIT_SECONDS)

    def log(self) -> str:
        """Of this service and those before it."""
        return (self._root / "service.log").read_text()

    def ask(
        self, method: str, path: str, headers: Mapping[str, str] | None = None, body: bytes | None = None
    ) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=LIMIT_SECONDS)
        connection.request(method, path, body, {"authorization": f"Bearer {self.token}", **(headers or {})})
        return connection.getresponse()

    def call(self, method: str, path: str, body: Any = None, key: str = "") -> tuple[int, Any]:
        """Status and JSON of an answer; `body`: bytes, or JSON."""
        content = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        headers = {"content-type": "application/json", "idempotency-key": key}
        with self.ask(method, f"/api/v1{path}", headers, content) as answer:
            return answer.status, json.loads(answer.read())

    def get(self, path: str) -> Any:
        status, found = self.call("GET", path)
        assert status == 200, found
        return found

    def submit(self, name: str, key: str = "") -> tuple[int, Any]:
        return self.call("POST", "/sweeps", {"yaml": dump_spec(make_spec(2, name=name))}, key or name)

    def queued(self, state: str) -> list[str]:
        """The sweeps in this state of the queue, in its order."""
        return [sweep["name"] for sweep in self.get("/queue")["queue"] if sweep["state"] == state]

    def text(self, path: str, method: str = "GET") -> str:
        with self.ask(method, path) as answer:
            return answer.read().decode()

    @contextmanager
    def events(self, path: str, last_id: str = "") -> Generator["EventStream"]:
        """The messages of a stream as they come."""
        with self.ask("GET", f"/api/v1{path}", {"last-event-id": last_id}) as answer:
            assert answer.status == 200, answer.read()
            yield EventStream(answer)

    def silent_reader(self, path: str) -> socket.socket:
        """A client that asks for a stream and reads nothing."""
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.settimeout(LIMIT_SECONDS)
        client.connect(("127.0.0.1", self.port))
        client.sendall(self.head("GET", path))
        return client

    def head(self, method: str, path: str, *more: str) -> bytes:
        """The first lines of a request, for clients that leave in the middle of it."""
        lines = (f"{method} /api/v1{path} HTTP/1.1", "host: localhost", f"authorization: Bearer {self.token}", *more)
        return "".join(f"{line}\r\n" for line in (*lines, "")).encode()


@dataclass
class EventStream:
    """Server-sent events: id, kind and data of each."""

    lines: Iterable[bytes]
    last_id: str = ""

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        kind = ""
        for line in self.lines:
            name, _, text = line.decode().rstrip("\n").partition(": ")
            if name == "id":
                self.last_id = text
            elif name == "event":
                kind = text
            elif name == "data":
                yield kind, json.loads(text)

    def until(self, kind: str, is_it: Callable[[Any], object] = lambda _: True) -> tuple[list[str], Any]:
        """The kinds of the messages before the first such one, and its data."""
        before: list[str] = []
        for found, data in self:
            if found == kind and is_it(data):
                return before, data
            before.append(found)
        raise AssertionError(f"the stream ended without {kind}, after {before}")


def drive(file: Path) -> int:
    root, name = runs_folder(), file.stem
    folder = SweepFolder(root, name)
    if (code := root / f"{name}.code").exists():
        print(f"{name} cannot be trained", file=sys.stderr)
        return int(code.read_text())
    if not folder.spec.exists():
        create_sweep_folder(folder, file.read_text(encoding="utf-8"))
    with folders.sweep_lock(folder):
        try:
            wait_until(lambda: not (root / f"{name}.prepares").exists())
        except KeyboardInterrupt:  # as of a driver that prepares
            shutil.rmtree(folder.path)
            return ExitCode.INTERRUPTED
    with (
        folders.sweep_lock(folder),
        Study.open(folder) if Study.exists(folder) else Study.create(folder, load_spec(file)) as study,
    ):
        study.start_driving()
        with (root / "starts").open("a") as starts:
            starts.write(f"{name}\n")
        wait_until(lambda: (root / "enough").exists() and name in (root / "enough").read_text().split())
        while isinstance(trial := study.ask(), Trial):
            study.report(trial, [evaluated(1, 0.5)])
            study.tell(trial, COMPLETE)
    return 0


if __name__ == "__main__":
    if boot := os.environ.get("TEST_BOOT"):
        folders.boot_id = lambda: boot
    if seconds := os.environ.get("TEST_BUSY"):
        queue_tables.BUSY_SECONDS = int(seconds)
    if sys.argv[1] == "service":
        serve(Path(sys.argv[2]), int(sys.argv[3]))
    if sys.argv[1] == "http":
        listen(Path(sys.argv[2]), int(sys.argv[3]))
        sys.exit(0)
    sys.exit(drive(Path(sys.argv[2])))
