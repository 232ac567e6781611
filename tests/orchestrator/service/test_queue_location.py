"""`orchestrate serve --queue`: the queue moves to PostgreSQL and back, whole, and belongs to one runs folder."""

import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.commands.runs_folder.queue_records import queue_actions, queued_files
from orchestrator.errors import StorageRefused
from orchestrator.redaction import redact
from orchestrator.service.driver_supervisor import ServiceRuns, lock_service
from orchestrator.service.hosting.queue_location import move_queue, open_queue, queue_problem, queue_url
from orchestrator.service.queue_tables import QueueTaken
from orchestrator.service.sweep_queue import QueueState, SweepQueue
from tests.support.local_driver import KILLED, killed_at
from tests.support.processes import LIMIT_SECONDS, call, orchestrate


def used_queue(root: Path) -> list[object]:
    """A queue with sweeps in several states, and all that it says of them."""
    queue = open_queue(root)
    for name in ("a", "b", "c"):
        queue.submit(name, "spec", root / name, owner="ann", priority=ord(name), key=name, digest=name)
    queue.begin_launch("a", "boot")
    queue.withdraw("b", "by ann")
    queue.resume("b")
    assert queue.begin_request("ann", "k", "1", "a") is None
    queue.store_answer("ann", "k", "{}")
    found = content(queue)
    queue.close()
    return found


def content(queue: SweepQueue) -> list[object]:
    answered = queue.begin_request("ann", "k", "1", "a")
    return [*queue.sweeps(), *(queue.actions(name) for name in ("a", "b", "c")), answered]


def at(root: Path) -> list[object]:
    queue = open_queue(root)
    found = content(queue)
    queue.close()
    return found


def test_a_queue_moves_to_a_server_and_back_with_all_that_it_has(
    fast_tmp_path: Path, new_postgresql: Callable[[], str]
) -> None:
    root, url = fast_tmp_path / "runs", new_postgresql()
    own, before = queue_url(root), used_queue(root)
    assert move_queue(root, "sqlite") == ""
    assert move_queue(root, url) == f"the queue is in {url} from now on; 3 sweeps came from {own}"
    assert (queue_url(root), at(root)) == (url, before)
    assert move_queue(root, url) == ""
    queue = open_queue(root)
    assert queue_actions(root, "b") == queue.actions("b"), "commands read it there"
    assert dict(queued_files(root)) == dict.fromkeys("abc", "spec")
    assert queue.submit("a", "spec", root / "a", owner="ann", key="a", digest="a") == (queue.find("a"), False)
    queue.submit("d", "spec", root / "d", owner="bob")
    after = content(queue)
    queue.close()
    assert "4 sweeps came from" in move_queue(root, "sqlite")
    assert (queue_url(root), at(root)) == (own, after)

    other = fast_tmp_path / "other"
    assert "0 sweeps" in move_queue(other, url), "a database that was left is free"
    with pytest.raises(QueueTaken, match=f"has the queue of {other} on .* give another database"):
        move_queue(root, url)
    assert (queue_url(root), at(root)) == (own, after)


def test_a_move_that_is_killed_is_done_again(fast_tmp_path: Path, new_postgresql: Callable[[], str]) -> None:
    root, url = fast_tmp_path / "runs", new_postgresql()
    own, before = queue_url(root), used_queue(root)
    assert killed_at(lambda: move_queue(root, url), "queue.copied") == KILLED
    assert (queue_url(root), at(root)) == (own, before), "until then nothing has moved"
    assert "3 sweeps" in move_queue(root, url)
    assert at(root) == before

    assert killed_at(lambda: move_queue(root, "sqlite"), "queue.copied") == KILLED
    queue = open_queue(root)
    queue.end("a", QueueState.FINISHED, "")  # meanwhile it is used
    queue.close()
    with pytest.raises(QueueTaken, match="has a queue with other sweeps than"):
        move_queue(root, "sqlite")
    assert queue_url(root) == url


def test_a_queue_in_use_is_not_moved(fast_tmp_path: Path, new_postgresql: Callable[[], str]) -> None:
    used_queue(fast_tmp_path)
    lock = lock_service(fast_tmp_path)
    with pytest.raises(ServiceRuns):
        move_queue(fast_tmp_path, new_postgresql())
    lock.release()
    assert queue_url(fast_tmp_path).startswith("sqlite:")


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ("mysql+pymysql://ann@db/queue", "a queue cannot be in mysql"),
        ("sqlite:////tmp/queue.db", "a queue in SQLite is in the runs folder"),
        ("postgresql+asyncpg://ann@db/queue", "'postgresql+asyncpg://ann@db/queue' cannot be used"),
        ("postgresql+psycopg://ann@db", "'postgresql+psycopg://ann@db' cannot be used"),
        ("postgresql+none://ann:secret@db/queue", "'...@db/queue' is no URL of a database"),
        ("the database", "'the database' is no URL of a database"),
        ("postgresql+psycopg://ann:secret@db/queue", "the URL has a password"),
        ("postgresql+psycopg://ann@db/queue?password=secret", "the URL has a password"),
    ],
)
def test_a_database_that_cannot_have_a_queue_is_refused_with_a_sentence(
    given: str, problem: str, tmp_path: Path
) -> None:
    found = queue_problem(given)
    assert found is not None
    assert found.startswith(problem)
    assert "secret" not in found
    root = tmp_path / "runs"
    code, _, err = call(root, "serve", "--queue", given)
    assert code == 2
    assert " ".join(err.split()) == f"--queue: {redact(found)}"
    assert not root.exists()


def test_a_server_that_does_not_answer_is_refused_and_nothing_is_moved(tmp_path: Path) -> None:
    pytest.importorskip("psycopg")
    root = tmp_path / "runs"
    before = used_queue(root)
    code, _, err = call(root, "serve", "--queue", "postgresql+psycopg://ann@127.0.0.1:1/queue")
    assert code == 5
    assert "/queue refused: connection failed: " in " ".join(err.split())
    assert at(root) == before
    assert queue_problem("postgresql+psycopg:///queue") is queue_problem("sqlite") is None
    with pytest.raises(StorageRefused):
        SweepQueue("postgresql+psycopg://ann@127.0.0.1:1/queue")


def test_the_service_remembers_its_queue(fast_tmp_path: Path, new_postgresql: Callable[[], str]) -> None:
    url = new_postgresql()
    used_queue(fast_tmp_path)
    for options in (("--queue", url), ()):
        served = orchestrate(fast_tmp_path, "serve", "--port", "0", *options)
        assert served.stdout is not None
        assert served.stdout.readline().startswith("http://")
        served.send_signal(signal.SIGTERM)
        err = " ".join(served.communicate(timeout=LIMIT_SECONDS)[1].split())
        assert (f"3 sweeps came from sqlite:///{fast_tmp_path}" in err) is bool(options)
    assert queue_url(fast_tmp_path) == url
