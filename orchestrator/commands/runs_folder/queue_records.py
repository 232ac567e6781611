"""What the queue of a service (`orchestrate serve`) has stored, for commands that look at the runs folder.

The queue is changed by `orchestrator.service` only, which defines its tables (`queue_tables`).
"""

from __future__ import annotations

import sqlite3
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sqlalchemy import Connection, column, create_engine, select, table
from sqlalchemy.exc import ArgumentError, DBAPIError

from orchestrator.errors import StorageRefused
from orchestrator.redaction import redact

SERVICE_FOLDER = "service"
"""In the runs folder: queue, tokens, the drivers' locks and uploaded files."""
QUEUE_POINTER, QUEUE_FILE = "queue.url", "queue.db"
"""In the service's folder: the URL of a queue on a server, and the queue itself where there is none."""
UPLOADS_FOLDER = "files"
"""In the service's folder: uploaded files by person."""
BY_SERVICE = "the service"
"""In place of a person: what the service did by itself. No person has a name with a space."""
_CONNECT_SECONDS = 5
_ACTIONS = table("service_actions", column("seq"), column("sweep"), column("at"), column("person"), column("action"))
_SWEEPS = table("service_sweeps", column("name"), column("spec"), column("state"))
_FINISHED = "finished"
"""State of a sweep in the queue that is never started again."""


@dataclass(frozen=True, slots=True)
class QueueAction:
    """One action of a person, or of the service."""

    at: float
    """Seconds since 1970."""
    person: str
    """BY_SERVICE for the service; "" for a program of this machine that changes the queue without the service's API."""
    action: str


def queue_url(root: Path) -> str:
    """Return the URL of a runs folder's queue: the content of `service/queue.url`, else SQLite beside it."""
    pointer = root / SERVICE_FOLDER / QUEUE_POINTER
    return pointer.read_text(encoding="utf-8").strip() if pointer.is_file() else own_queue_url(root)


def own_queue_url(root: Path) -> str:
    """Return the URL of the SQLite file in a runs folder that has its queue by default."""
    return f"sqlite:///{_database(root)}"


def actions_of(connection: Connection, name: str) -> list[QueueAction]:
    """Return what was done with a sweep in the queue, oldest first."""
    columns = (_ACTIONS.c.at, _ACTIONS.c.person, _ACTIONS.c.action)
    rows = connection.execute(select(*columns).where(_ACTIONS.c.sweep == name).order_by(_ACTIONS.c.seq))
    return [QueueAction(*row) for row in rows]


def queue_actions(root: Path, name: str) -> list[QueueAction]:
    """Return the actions with a sweep in the queue of a runs folder; none where it has no queue.

    Raises StorageRefused.
    """
    with _reading(root) as connection:
        return [] if connection is None else actions_of(connection, name)


def queued_files(root: Path) -> Sequence[tuple[str, str]]:
    """Return name and resolved file of each sweep that a service may start or resume. Raises StorageRefused."""
    with _reading(root) as connection:
        if connection is None:
            return []
        found = select(_SWEEPS.c.name, _SWEEPS.c.spec).where(_SWEEPS.c.state != _FINISHED)
        return [(row.name, row.spec) for row in connection.execute(found)]


@contextmanager
def _reading(root: Path) -> Generator[Connection | None]:
    """Open the queue to read; None where the runs folder has none."""
    url = queue_url(root)
    of_folder = _database(root)
    is_file = url == own_queue_url(root)
    if is_file and not of_folder.is_file():
        yield None
        return
    more: dict[str, Any] = {}
    if is_file:
        more["creator"] = lambda: sqlite3.connect(f"file:{quote(str(of_folder))}?mode=ro", uri=True)
    elif url.startswith("postgresql"):
        more["connect_args"] = {"connect_timeout": _CONNECT_SECONDS}
    try:
        engine = create_engine(url, **more)
        try:
            with engine.connect() as connection:
                yield connection
        finally:
            engine.dispose()
    except (ArgumentError, ImportError, DBAPIError, sqlite3.Error) as error:
        reason = error.orig if isinstance(error, DBAPIError) else error
        raise StorageRefused(f"the queue in {redact(url)} cannot be read: {reason}") from error


def _database(root: Path) -> Path:
    return root / SERVICE_FOLDER / QUEUE_FILE
