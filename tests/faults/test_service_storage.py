"""The service with storage that refuses, and clients that leave: nothing is lost, doubled, or half done."""

import hashlib
import json
import os
import socket
import sqlite3
import struct
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Generator
from contextlib import closing, contextmanager
from itertools import cycle
from pathlib import Path

import pytest

from orchestrator import api
from orchestrator.api.service_client import ServiceUnreachable
from orchestrator.api.uploads import upload_file
from orchestrator.folders import SweepFolder
from orchestrator.service.hosting.queue_location import move_queue, open_queue
from orchestrator.service.sweep_queue import QueueState
from orchestrator.spec.loading.serialization import dump_spec
from orchestrator.study.reader import StudyReader
from tests.support.local_driver import KILLED
from tests.support.postgresql import own_postgresql_server
from tests.support.processes import wait_until
from tests.support.service_process import RunningService, finish, holder, pid_of, starts
from tests.support.specs import make_spec
from tests.support.storage_faults import fill, on_small_disk, write_locked


@pytest.fixture
def root(service_root: Path) -> Path:
    return service_root


def problem(service: RunningService) -> str:
    """What keeps the service from starting sweeps."""
    return service.get("/me")["problem"]


def end_all(root: Path, service: RunningService, *names: str) -> dict[str, tuple[QueueState, int]]:
    """Let the sweeps end, then the service; state and deaths of each."""
    finish(root, *names)
    queue = open_queue(root)
    wait_until(lambda: all(sweep.state.has_ended for sweep in queue.sweeps()), service.log)
    service.end()
    found = {sweep.name: (sweep.state, sweep.deaths) for sweep in queue.sweeps()}
    queue.close()
    return found


@pytest.mark.faults
def test_while_another_process_locks_the_queue_it_is_read_and_nothing_is_half_changed(root: Path) -> None:
    service = RunningService(root, TEST_BUSY="1")
    assert [service.submit(name)[0] for name in "ab"] == [201, 201]
    wait_until(lambda: holder(root, "a"))
    with write_locked(root / "service" / "queue.db"):
        with service.events("/sweeps/b/events") as events:
            events.until("reload")
        assert (service.queued("driven"), service.queued("waiting")) == (["a"], ["b"])
        status, refused = service.submit("c")
        assert (status, refused["error"]) == (503, "StorageRefused")
        assert "refused: database is locked" in refused["detail"]
        assert service.call("POST", "/sweeps/b/withdraw", {})[0] == 503
        finish(root, "a")
        wait_until(lambda: "database is locked" in problem(service))
        with service.ask("GET", "/healthz") as answer:
            assert answer.status == 503
        assert starts(root) == ["a"]
        assert service.get("/sweeps/a")["state"] == "finished", "the study is not locked"
    assert service.submit("c")[0] == 201
    assert service.submit("c")[0] == 200
    wait_until(lambda: starts(root) == ["a", "b"] and not problem(service))
    assert end_all(root, service, "b", "c") == dict.fromkeys("abc", (QueueState.FINISHED, 0))
    assert starts(root) == ["a", "b", "c"]
    assert "Traceback" not in service.log()


@contextmanager
def asked_meanwhile(service: RunningService, *paths: str) -> Generator[Counter[tuple[str, int]]]:
    """The statuses of requests that are sent one after the other until this is left."""
    found, ends = Counter[tuple[str, int]](), threading.Event()

    def ask() -> None:
        for path in cycle(paths):
            if ends.is_set():
                return
            with service.ask("GET", path) as answer:
                answer.read()
                found[path, answer.status] += 1

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        yield found
    finally:
        ends.set()
        asking.join()


@pytest.mark.faults
def test_a_database_server_that_is_started_again_is_waited_for(root: Path) -> None:
    with own_postgresql_server() as server:
        move_queue(root, server.url)
        service = RunningService(root)
        for name in "abc":
            file = dump_spec(make_spec(2, name=name, storage=server.url))
            assert service.call("POST", "/sweeps", {"yaml": file}, name)[0] == 201
        wait_until(lambda: starts(root) == ["a"] and StudyReader.exists(SweepFolder(root, "a")))
        with service.events("/sweeps/a/events") as events, service.events("/events") as of_list:
            events.until("reload")
            of_list.until("reload")
            assert [sweep["state"] for sweep in service.get("/sweeps")["sweeps"]] == ["running", "waiting", "waiting"]
            server.stop()
            events.until("problem", lambda data: "refused" in data["detail"])
            wait_until(lambda: "refused" in problem(service))
            refused = [service.call("GET", path) for path in ("/sweeps", "/queue", "/sweeps/a", "/sweeps/a/trials")]
            refused += [service.submit("d"), service.call("POST", "/sweeps/b/priority", {"priority": 7})]
            for status, content in refused:
                assert (status, content["error"]) == (503, "StorageRefused"), content
                assert content["detail"].count("\n") == 0, "a sentence"
            for path in ("/", "/sweeps/a", "/metrics", "/healthz"):
                with service.ask("GET", path) as answer:
                    assert answer.status == 503, path
            server.start()
            wait_until(lambda: not problem(service))
            asked = ("/", "/api/v1/sweeps", "/api/v1/sweeps/a", "/sweeps/a", "/sweeps/a/panels", "/api/v1/queue")
            with asked_meanwhile(service, *asked) as found:
                for _ in range(3):  # connections end in the middle of transactions
                    seen = found.total()
                    wait_until(lambda seen=seen: found.total() > seen + len(asked))
                    server.stop()
                    wait_until(lambda: problem(service))
                    server.start()
                    wait_until(lambda: not problem(service))
            # 429: a slow machine gives time for more requests than one person may make.
            assert {status for _, status in found} - {429} == {200, 503}, found
            assert service.queued("driven") == ["a"]
            assert service.call("POST", "/sweeps/b/priority", {"priority": 7})[0] == 200
            events.until("reload")
            with StudyReader.open(SweepFolder(root, "a")) as study:
                study.add_event("judged", "by hand")
            events.until("history", lambda data: data["events"][-1]["kind"] == "judged")
            of_list.until("sweeps", lambda data: any(sweep["name"] == "b" for sweep in data["changed"]))
        assert starts(root) == ["a"]
        server.stop()
        finish(root, "a")  # its driver begins a trial, which the study refuses
        wait_until(lambda: holder(root, "a") is None and problem(service))
        assert starts(root) == ["a"]
        server.start()
        ended = end_all(root, service, "b", "c")
        assert ended == {"a": (QueueState.FINISHED, 1)} | dict.fromkeys("bc", (QueueState.FINISHED, 0))
        assert starts(root) == ["a", "a", "b", "c"]
        assert "Traceback" not in service.log()


def on_full_disk(root: Path) -> None:
    service, content = RunningService(root), bytes(range(256)) * 40
    upload = f"/files/{hashlib.sha256(content).hexdigest()}?size={len(content)}&name=rows.jsonl"
    assert [service.submit(name)[0] for name in "ab"] == [201, 201]
    assert service.call("POST", f"{upload}&offset=0", content[:1000])[1]["offset"] == 1000
    wait_until(lambda: starts(root))
    # While others read the databases, their logs can only grow, and the end of a process frees nothing.
    queue, study = (sqlite3.connect(root / path, isolation_level=None) for path in ("service/queue.db", "a/study.db"))
    with closing(queue), closing(study):
        for database in (queue, study):
            database.execute("BEGIN")
            database.execute("SELECT count(*) FROM sqlite_master")
        ballast = fill(root)
        for path, body in (
            (upload + "&offset=1000", content[1000:]),
            ("/files/" + "0" * 64 + "?size=9&name=x&offset=0", b"x"),
        ):
            status, refused = service.call("POST", path, body)
            assert (status, refused.get("error")) == (503, "StorageRefused"), refused
            assert "disk is full" in refused["detail"]
        assert service.get(upload) == {"offset": 1000, "complete": False}
        os.kill(pid_of(root, "a"), 9)
        wait_until(lambda: problem(service))
        assert {entry["name"] for entry in service.get("/sweeps")["sweeps"]} == {"a", "b"}
        status, refused = service.submit("c")
        assert (status, "disk is full" in refused["detail"]) == (503, True), refused
        assert starts(root) == ["a"]
        ballast.unlink()
    wait_until(lambda: not problem(service) and len(starts(root)) == 2)
    assert service.submit("c")[0] == 201
    assert service.call("POST", f"{upload}&offset=1000", content[1000:])[1] == {
        "offset": len(content),
        "complete": True,
    }
    found = end_all(root, service, "a", "b", "c")
    assert found == {"a": (QueueState.FINISHED, 1)} | dict.fromkeys("bc", (QueueState.FINISHED, 0))
    assert starts(root) == ["a", "a", "b", "c"]
    assert "Traceback" not in service.log()


@pytest.mark.faults
def test_on_a_full_disk_it_says_so_and_continues_once_there_is_space(tmp_path: Path) -> None:
    on_small_disk(tmp_path / "disk", "16m", on_full_disk)


UPLOAD = """
import sys
from pathlib import Path
from orchestrator.api import uploads
from orchestrator.api.service_client import ServiceClient
uploads._PART_BYTES = 1000
def show(sent, _):
    print(sent, flush=True)
    if sent == 3000:
        input()
uploads.upload_file(ServiceClient(sys.argv[1], sys.argv[2]), Path(sys.argv[3]), show)
"""


def test_an_upload_is_continued_whoever_was_killed_and_half_a_file_is_none(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, name = tmp_path / "rows.jsonl", "rows.jsonl"
    file.write_bytes(b"".join(json.dumps({"prompt": f"{n}"}).encode() + b"\n" for n in range(1000)))
    size, digest = file.stat().st_size, hashlib.sha256(file.read_bytes()).hexdigest()
    where = f"/files/{digest}?size={size}&name={name}"
    service = RunningService(root, ORCHESTRATE_FAILPOINT="upload.checked")

    command = [sys.executable, "-c", UPLOAD, service.url, service.token, str(file)]
    client = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert client.stdout is not None
    while client.stdout.readline() != "3000\n":
        assert client.poll() is None
    client.kill()
    client.communicate()
    for sent in (0, 500):  # a client that leaves in the middle of a part
        with socket.create_connection(("127.0.0.1", service.port)) as leaving:
            leaving.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            leaving.sendall(service.head("POST", f"{where}&offset=3000", "content-length: 1000") + b"x" * sent)
    assert service.get(where) == {"offset": 3000, "complete": False}
    body = {"yaml": "name: half", "files": {name: f"{digest}/{name}"}}
    status, refused = service.call("POST", "/plan", body)
    assert (status, "was not uploaded completely" in refused["detail"]) == (422, True)

    monkeypatch.setattr("orchestrator.api.service_client._WAITS", ())
    with pytest.raises(ServiceUnreachable):
        upload_file(api.connect(service.url, service.token).client, file)  # the service is killed before the last step
    assert service.process.wait() == KILLED
    again = RunningService(root)
    assert again.get(where) == {"offset": size, "complete": False}
    steps = list[int]()
    upload_file(api.connect(again.url, again.token).client, file, lambda sent, _: steps.append(sent))
    assert steps == [size, size], "nothing is sent twice"
    (stored,) = (root / "service" / "files" / "local").glob("*/[!.]*")
    assert stored.read_bytes() == file.read_bytes()
    again.end()
    assert "Traceback" not in again.log()
