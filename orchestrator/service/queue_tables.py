"""Tables of `SweepQueue`: its sweeps, the requests that must not be carried out twice, and what people did.

An action is written in the transaction that changes the sweep. Changes of a sweep that has begun are in its study, as
`orchestrate history` shows them.
"""

from __future__ import annotations

import sqlite3
import time
from pathlib import Path

from sqlalchemy import (
    Boolean,
    Column,
    Connection,
    Float,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    insert,
)

from orchestrator.commands.request_commands import acting_person

_BUSY_SECONDS = 60.0

METADATA = MetaData()
SWEEPS = Table(
    "service_sweeps",
    METADATA,
    Column("seq", Integer, primary_key=True, autoincrement=True),
    Column("name", String(64), nullable=False, unique=True),
    Column("owner", String(64), nullable=False),
    Column("priority", Integer, nullable=False),
    Column("state", String(16), nullable=False, index=True),
    Column("spec", Text, nullable=False),
    Column("gpus", Integer, nullable=False),
    Column("launch", Integer, nullable=False, default=0),
    Column("boot", String(64), nullable=False, default=""),
    Column("again", Boolean, nullable=False, default=False),
    Column("deaths", Integer, nullable=False, default=0),
    Column("why", Text, nullable=False, default=""),
    Column("submitted_at", Float, nullable=False),
    Column("started_at", Float),
    Column("ended_at", Float),
)
REQUESTS = Table(
    "service_requests",
    METADATA,
    Column("person", String(64), primary_key=True),
    Column("key", String(128), primary_key=True),
    Column("digest", String(64), nullable=False),
    Column("sweep", String(64), nullable=False),
    Column("answer", Text),  # JSON; none of a submission, whose answer is the sweep
    Column("at", Float, nullable=False),
)
ACTIONS = Table(
    "service_actions",
    METADATA,
    Column("seq", Integer, primary_key=True, autoincrement=True),
    Column("sweep", String(64), nullable=False, index=True),
    Column("at", Float, nullable=False),
    Column("person", String(64), nullable=False),
    Column("action", Text, nullable=False),
)


def record_action(connection: Connection, name: str, action: str, person: str | None = None) -> None:
    """Add an action to the history of a sweep, by default of the person whose request is answered."""
    row = {"sweep": name, "at": time.time(), "person": acting_person() if person is None else person, "action": action}
    connection.execute(insert(ACTIONS).values(**row))


def connect(database: Path) -> sqlite3.Connection:
    """Connect without implicit transactions; a commit is on the disk before it returns."""
    connection = sqlite3.connect(database, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")
    return connection
