"""Where a runs folder's queue is: SQLite in the folder, or PostgreSQL by `orchestrate serve --queue URL`.

The URL is in `service/queue.url`, so that every later service finds the same queue. Written last, it decides which of
two databases has the queue while that is moved: a move that was interrupted is done again.
"""

from __future__ import annotations

import socket
from contextlib import ExitStack, closing
from pathlib import Path
from uuid import uuid4

from sqlalchemy import make_url
from sqlalchemy.exc import ArgumentError

from orchestrator.commands.runs_folder.queue_records import (
    QUEUE_FILE,
    QUEUE_POINTER,
    SERVICE_FOLDER,
    own_queue_url,
    queue_url,
)
from orchestrator.service.driver_supervisor import lock_service
from orchestrator.service.queue_tables import QueueDatabase
from orchestrator.service.sweep_queue import SweepQueue
from trainer.storage.atomic_files import write_text
from trainer.storage.failpoints import failpoint

OWN_QUEUE = "sqlite"
"""Value of `--queue` for SQLite in the runs folder."""
_ID = "queue.id"
_WANTED = "give postgresql+psycopg://HOST/DATABASE, or sqlite for the runs folder's own file"


def open_queue(root: Path) -> SweepQueue:
    """Open a runs folder's queue.

    Raises:
        PasswordInUrl, NetworkDisk, StorageRefused: as `QueueDatabase`.
        QueueTaken: the database has the queue of another runs folder.
    """
    return SweepQueue(_open(root, queue_url(root)))


def queue_problem(given: str) -> str | None:
    """Return why a value of `--queue` names no database for a queue; None if it may."""
    if given == OWN_QUEUE:
        return None
    try:
        url = make_url(given)
        kind = url.get_backend_name()
        is_async = kind == "postgresql" and url.get_dialect().is_async
    except ArgumentError:  # no URL, or a driver of which SQLAlchemy knows nothing
        return f"{_without_password(given)!r} is no URL of a database: {_WANTED}"
    if url.password is not None or "password" in url.query:
        return "the URL has a password, which would be written to a file: give it by $PGPASSWORD or ~/.pgpass"
    if kind == "sqlite":
        return f"a queue in SQLite is in the runs folder: {_WANTED}"
    if kind != "postgresql":
        return f"a queue cannot be in {kind}: {_WANTED}"
    if is_async or not url.database:
        return f"{given!r} cannot be used: {_WANTED}"
    return None


def move_queue(root: Path, given: str) -> str:
    """Make a database the runs folder's queue, with the sweeps of the one before; return what was moved, "" if nothing.

    Args:
        root: the runs folder.
        given: a value of `--queue` without a problem.

    Raises:
        ServiceRuns: a service uses the present queue.
        QueueTaken: the database has another queue.
        PasswordInUrl, NetworkDisk, StorageRefused: as `QueueDatabase`, of either database.
    """
    before, after = queue_url(root), own_queue_url(root) if given == OWN_QUEUE else given
    folder, count = root / SERVICE_FOLDER, 0
    if after == before:
        return ""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with ExitStack() as stack:
        stack.callback(lock_service(root).release)
        target = stack.enter_context(closing(_open(root, after)))
        has_source = before != own_queue_url(root) or (folder / QUEUE_FILE).exists()
        source = stack.enter_context(closing(_open(root, before))) if has_source else None
        if source is not None:
            count = target.copy_from(source)
        failpoint("queue.copied")
        if after == own_queue_url(root):
            (folder / QUEUE_POINTER).unlink()
        else:
            write_text(folder / QUEUE_POINTER, after + "\n")
        if source is not None:
            source.empty()
    return f"the queue is in {after} from now on; {count} sweep{'' if count == 1 else 's'} came from {before}"


def _open(root: Path, url: str) -> QueueDatabase:
    database = QueueDatabase(url)
    try:
        _claim(database, root)
    except BaseException:
        database.close()
        raise
    return database


def _claim(database: QueueDatabase, root: Path) -> None:
    """Make a database on a server this runs folder's; the folder's own file is. Raises QueueTaken."""
    if database.url != own_queue_url(root):
        database.claim(_runs_id(root), f"{root} on {socket.gethostname()}")


def _runs_id(root: Path) -> str:
    """Return what tells this runs folder from others, wherever it is mounted."""
    file = root / SERVICE_FOLDER / _ID
    if not file.is_file():
        write_text(file, uuid4().hex + "\n")
    return file.read_text(encoding="ascii").strip()


def _without_password(text: str) -> str:
    """Return a text that may be a URL without what is before its host."""
    _, at, after = text.rpartition("@")
    return f"...{at}{after}" if at else text
