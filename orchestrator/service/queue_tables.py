"""Tables of `SweepQueue`: its sweeps, the requests that must not be carried out twice, and what people did.

An action is written in the transaction that changes the sweep. Changes of a sweep that has begun are in its study, as
`orchestrate history` shows them. `QueueDatabase` has the tables in SQLite or PostgreSQL.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import (
    Boolean,
    Column,
    Connection,
    Dialect,
    Float,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    TypeDecorator,
    create_engine,
    insert,
    inspect,
    make_url,
    select,
)
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.exc import TimeoutError as NoConnectionFree

from orchestrator.commands.request_commands import acting_person
from orchestrator.errors import NetworkDisk, OrchestrateError, PasswordInUrl, StorageRefused, first_line
from orchestrator.folders import NETWORK_FILESYSTEMS, filesystem_type

BUSY_SECONDS = 10
"""For which a change waits for another process that holds the database's lock; reading waits for none."""
_CONNECTION: dict[str, Any] = {"connect_timeout": 10, "tcp_user_timeout": 60_000}
"""Of libpq, in seconds and milliseconds: a server that is gone is an error and no wait without end."""
_MOST_CONNECTIONS = 25
"""To a PostgreSQL server, beside the five that are kept."""
_LOCK = 7_236_837_402_914
"""PostgreSQL's advisory lock of a change: any number that other programs are unlikely to use."""


class _AnyText(TypeDecorator[str]):
    """Text of people and logs. PostgreSQL stores neither NUL nor half of a surrogate pair: they become U+FFFD, `?`."""

    impl, cache_ok = Text, True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:  # noqa: ARG002
        """Return what both databases store."""
        return value and value.encode(errors="replace").decode().replace("\0", "\N{REPLACEMENT CHARACTER}")


METADATA = MetaData()
SWEEPS = Table(
    "service_sweeps",
    METADATA,
    Column("seq", Integer, primary_key=True, autoincrement=True),
    Column("name", String(64), nullable=False, unique=True),
    Column("owner", String(64), nullable=False),
    Column("priority", Integer, nullable=False),
    Column("state", String(16), nullable=False, index=True),
    Column("spec", _AnyText, nullable=False),
    Column("gpus", Integer, nullable=False),
    Column("launch", Integer, nullable=False, default=0),
    Column("boot", String(64), nullable=False, default=""),
    Column("again", Boolean, nullable=False, default=False),
    Column("deaths", Integer, nullable=False, default=0),
    Column("why", _AnyText, nullable=False, default=""),
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
    Column("action", _AnyText, nullable=False),
)
OWNER = Table(
    "service_owner",
    METADATA,
    Column("runs", String(32), primary_key=True),  # id of the runs folder
    Column("place", _AnyText, nullable=False),
)
"""One row: the runs folder whose queue this is; none of a queue in its own runs folder."""


def record_action(connection: Connection, name: str, action: str, person: str | None = None) -> None:
    """Add an action to the history of a sweep, by default of the person whose request is answered."""
    row = {"sweep": name, "at": time.time(), "person": acting_person() if person is None else person, "action": action}
    connection.execute(insert(ACTIONS).values(**row))


class QueueTaken(OrchestrateError):
    """The database has the queue of another runs folder, or sweeps that are not of this one."""


class QueueDatabase:
    """The tables in their database. Changes come one after the other, whichever process makes them. Thread-safe."""

    def __init__(self, url: str) -> None:
        """Open the database and create missing tables.

        Args:
            url: SQLAlchemy URL; SQLite must be on a local disk.

        Raises:
            PasswordInUrl, NetworkDisk: the URL is not accepted.
            StorageRefused: the database cannot be opened.
        """
        try:
            parsed = make_url(url)
        except ArgumentError as error:
            raise StorageRefused(f"the queue cannot be opened: {first_line(error)}") from error
        if parsed.get_backend_name() not in ("sqlite", "postgresql"):
            raise StorageRefused(f"a queue cannot be in {parsed.get_backend_name()}")
        if parsed.password is not None or "password" in parsed.query:
            raise PasswordInUrl(parsed.difference_update_query(["password"]).render_as_string(hide_password=True))
        self.url, self._sqlite = url, parsed.get_backend_name() == "sqlite"
        options: dict[str, Any] = {"pool_pre_ping": True, "pool_timeout": BUSY_SECONDS}
        if self._sqlite:
            database = Path(parsed.database or "")
            database.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            if (kind := filesystem_type(database.parent)) in NETWORK_FILESYSTEMS:
                raise NetworkDisk(database, kind, "the queue in PostgreSQL (`orchestrate serve --queue URL`)")
            # Requests that wait for the lock leave connections to those that read.
            options |= {"creator": lambda: _connect(database), "max_overflow": -1}
        else:
            given = {name: value for name, value in _CONNECTION.items() if name not in parsed.query}
            options |= {"isolation_level": "READ COMMITTED", "connect_args": given, "max_overflow": _MOST_CONNECTIONS}
        with self._translated_errors():
            self._engine = create_engine(url, **options)
        with self.snapshot() as connection:
            is_complete = set(METADATA.tables) <= set(inspect(connection).get_table_names())
        if not is_complete:
            with self.change() as connection:
                METADATA.create_all(connection)

    def close(self) -> None:
        """Close the connections."""
        self._engine.dispose()

    @contextmanager
    def change(self) -> Generator[Connection]:
        """Open a transaction that no other change overlaps. Raises StorageRefused."""
        with self._translated_errors(), self._engine.connect() as connection, connection.begin():
            if self._sqlite:
                connection.exec_driver_sql("BEGIN IMMEDIATE")
            else:
                connection.exec_driver_sql(f"SET LOCAL lock_timeout = '{BUSY_SECONDS}s'")
                connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_LOCK})")
            yield connection

    @contextmanager
    def snapshot(self) -> Generator[Connection]:
        """Open a transaction that reads; it waits for no change. Raises StorageRefused."""
        with self._translated_errors(), self._engine.connect() as connection, connection.begin():
            if self._sqlite:
                connection.exec_driver_sql("BEGIN")
            yield connection

    def claim(self, runs: str, place: str) -> None:
        """Record whose queue this is, by the id and the path of a runs folder. Raises QueueTaken."""
        with self.change() as connection:
            found = connection.execute(select(OWNER)).first()
            if found is None:
                connection.execute(insert(OWNER).values(runs=runs, place=place))
            elif found.runs != runs:
                raise QueueTaken(
                    f"{self.url} has the queue of {found.place}: its sweeps would start here too; give another database"
                )

    def copy_from(self, other: QueueDatabase) -> int:
        """Copy the rows of another queue into this empty one; return the number of sweeps.

        Raises:
            QueueTaken: this one has other rows.
        """
        with other.snapshot() as connection:
            theirs = _rows(connection)
        with self.change() as connection:
            mine = _rows(connection)
            if any(mine.values()) and mine != theirs:  # equal: copied before, and the process was killed after it
                raise QueueTaken(f"{self.url} has a queue with other sweeps than {other.url}: give an empty database")
            for name, rows in theirs.items():
                if rows and not mine[name]:
                    connection.execute(insert(METADATA.tables[name]), rows)
        return len(theirs[SWEEPS.name])

    def empty(self) -> None:
        """Remove all rows."""
        with self.change() as connection:
            for table in METADATA.sorted_tables:
                connection.execute(table.delete())

    @contextmanager
    def _translated_errors(self) -> Generator[None]:
        try:
            yield
        except DBAPIError as error:
            raise StorageRefused(f"the queue in {self.url} refused: {first_line(error.orig)}") from error
        except sqlite3.Error as error:
            raise StorageRefused(f"the queue in {self.url} refused: {error}") from error
        except NoConnectionFree as error:
            raise StorageRefused(f"the queue in {self.url} has no free connection") from error
        except ImportError as error:
            raise StorageRefused(
                f"the queue in {self.url} needs a driver that is not installed: pip install 'prefsweep[postgresql]'"
            ) from error


def _rows(connection: Connection) -> dict[str, list[dict[str, Any]]]:
    """Return all rows but the owner's, by table; actions without their numbers, which each database gives itself."""
    found: dict[str, list[dict[str, Any]]] = {}
    for table in (SWEEPS, REQUESTS, ACTIONS):
        columns = [column for column in table.columns if table is not ACTIONS or not column.primary_key]
        rows = connection.execute(select(*columns).order_by(*table.primary_key.columns))
        found[table.name] = [dict(row) for row in rows.mappings()]
    return found


def _connect(database: Path) -> sqlite3.Connection:
    """Connect without implicit transactions; a commit is on the disk before it returns."""
    connection = sqlite3.connect(database, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")
    return connection
