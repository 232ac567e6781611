"""A service and its drivers as processes that tests may kill: `service ROOT AT_ONCE`, `http ROOT` or `driver FILE`.

A driver has the sweep's real lock, study and lease, and trains nothing: it ends when its sweep's name is in the file
`enough`, or with the exit code in the file `NAME.code`.
"""

import http.client
import json
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

from orchestrator import folders
from orchestrator.folders import SweepFolder, create_sweep_folder, runs_folder
from orchestrator.service.driver_supervisor import DriverSupervisor
from orchestrator.service.sweep_queue import SweepQueue
from orchestrator.spec.loading.loader import load_spec
from orchestrator.study.study import Study
from orchestrator.study.trial_records import Trial
from tests.support.metrics import COMPLETE, evaluated
from tests.support.processes import LIMIT_SECONDS, environment, wait_until


def queue_url(root: Path) -> str:
    return f"sqlite:///{root}/service/queue.db"


def driver_command(file: Path) -> list[str]:
    return [sys.executable, "-m", "tests.support.service_process", "driver", str(file)]


def serve(root: Path, at_once: int) -> None:
    """A service's loop, without its pages."""
    supervisor = DriverSupervisor(root, SweepQueue(queue_url(root)), at_once=at_once, command=driver_command)
    print("serves", flush=True)
    while True:
        supervisor.step()
        time.sleep(0.05)


def listen(root: Path) -> None:
    """A whole service on a free port of this machine; its first line has the port and the machine's token."""
    import uvicorn

    from orchestrator.service import http_app, sweep_watchers

    sweep_watchers.POLL_SECONDS = 0.02
    http_app.DriverSupervisor = partial(DriverSupervisor, command=driver_command)
    service = http_app.Service(root)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(json.dumps([listener.getsockname()[1], service.tokens.machine_token()]), flush=True)
        config = uvicorn.Config(service.app, log_level="warning", timeout_graceful_shutdown=1)
        uvicorn.Server(config).run(sockets=[listener])


class RunningService:
    """A service in a process of its own, and a client of it, as the machine's owner."""

    def __init__(self, root: Path) -> None:
        command = [sys.executable, "-m", "tests.support.service_process", "http", str(root)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment(root))
        assert self.process.stdout is not None
        self.port, self._token = json.loads(self.process.stdout.readline())

    def end(self) -> None:
        self.process.terminate()
        self.process.wait(LIMIT_SECONDS)

    def ask(self, method: str, path: str, headers: Mapping[str, str] | None = None) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=LIMIT_SECONDS)
        connection.request(method, path, headers={"authorization": f"Bearer {self._token}", **(headers or {})})
        return connection.getresponse()

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
        head = f"GET /api/v1{path} HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {self._token}\r\n\r\n"
        client.sendall(head.encode())
        return client


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
    if sys.argv[1] == "service":
        serve(Path(sys.argv[2]), int(sys.argv[3]))
    if sys.argv[1] == "http":
        listen(Path(sys.argv[2]))
        sys.exit(0)
    sys.exit(drive(Path(sys.argv[2])))
