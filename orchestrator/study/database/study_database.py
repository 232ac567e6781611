"""`StudyDatabase`: one transaction over Optuna's tables and this package's, so that no reader sees a partial write.

`create_study` writes everything that is fixed when a sweep begins in one transaction.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, closing, contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

import optuna
from optuna.exceptions import DuplicatedStudyError, StorageInternalError
from optuna.storages import RDBStorage
from optuna.study import StudyDirection
from sqlalchemy import Connection, Dialect, Engine, create_engine, delete, func, insert, inspect, make_url, select, text
from sqlalchemy.dialects import sqlite
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import scoped_session, sessionmaker
from sqlalchemy.pool import NullPool
from sqlalchemy.schema import CreateTable

from orchestrator.errors import NameTaken, NetworkDisk, PasswordInUrl, StorageRefused, StudyMissing
from orchestrator.folders import NETWORK_FILESYSTEMS, SweepFolder, filesystem_type
from orchestrator.spec.sweep_spec import SweepSpec
from orchestrator.study import sweep_terms
from orchestrator.study.database.enqueued_trials import TrialQueue
from orchestrator.study.database.repository import SweepRepository
from orchestrator.study.database.tables import EVENT, METADATA, SCHEMA, SWEEP
from orchestrator.study.sweep_terms import TERMS_KEY, SweepTerms
from trainer.storage.atomic_files import write_text
from trainer.storage.failpoints import failpoint

_BUSY_SECONDS = 60.0


def study_url(folder: SweepFolder) -> str:
    """Return the database URL of a sweep's study: the content of `study.url`, else SQLite in the folder."""
    pointer = folder.database.with_suffix(".url")
    return pointer.read_text().strip() if pointer.is_file() else f"sqlite:///{folder.database}"


def has_own_database(folder: SweepFolder) -> bool:
    """Return whether the study is the folder's own SQLite database, which only this machine's drivers can have open."""
    return not folder.database.with_suffix(".url").is_file()


def choose_study_url(folder: SweepFolder, storage: str | None) -> str:
    """Return the database URL of a new study: `storage`, else the folder's own. Raises PasswordInUrl."""
    if storage is not None and make_url(storage).password is not None:
        raise PasswordInUrl(hide_password(storage))
    return study_url(folder) if storage is None else storage


def store_study_url(folder: SweepFolder, storage: str) -> None:
    """Record that the study of this folder is in the database `storage`."""
    write_text(folder.database.with_suffix(".url"), storage + "\n")


def study_exists(url: str, sweep: str) -> bool:
    """Return whether the database has the sweep; False if its creation was interrupted.

    A database that cannot be read counts as existing: opening it reports the error.
    """
    parsed = make_url(url)
    try:
        if parsed.get_backend_name() == "sqlite":
            database = Path(parsed.database or "")
            return database.is_file() and sweep in _changes_in_file(database)
        with _engine_to_ask(url).connect() as connection:
            if not inspect(connection).has_table(SWEEP.name):
                return False
            return connection.execute(select(SWEEP.c.sweep).where(SWEEP.c.sweep == sweep)).first() is not None
    except (DBAPIError, sqlite3.Error):
        return True


def last_changes(url: str) -> dict[str, list[Any]]:
    """Return sweep -> what changes with every write to its study but metrics, heartbeats and requests.

    That is the sweep's id, its driver's fencing token and the number of its last event, asked with one query for all
    sweeps of the database.

    Raises:
        StorageRefused: the database cannot be read.
    """
    parsed = make_url(url)
    if parsed.get_backend_name() == "sqlite":
        try:
            return _changes_in_file(Path(parsed.database or ""))
        except sqlite3.Error as error:
            raise StorageRefused(f"the study in {hide_password(url)} refused: {error}") from error
    with _translated_errors(hide_password(url)), _engine_to_ask(url).connect() as connection:
        if not inspect(connection).has_table(SWEEP.name):
            return {}
        return {sweep: change for sweep, *change in connection.execute(_CHANGES)}


_CHANGES = select(
    SWEEP.c.sweep,
    SWEEP.c.id,
    SWEEP.c.driver,
    select(func.max(EVENT.c.seq)).where(EVENT.c.sweep == SWEEP.c.sweep).scalar_subquery(),
)
_CHANGES_IN_FILE = str(_CHANGES.compile(dialect=sqlite.dialect()))


def _changes_in_file(database: Path) -> dict[str, list[Any]]:
    """Return `last_changes` of an SQLite file; nothing of one whose creation was interrupted."""
    with closing(_connect_to_read(database)) as connection:
        if (SWEEP.name,) not in connection.execute(_TABLES):
            return {}
        return {sweep: change for sweep, *change in connection.execute(_CHANGES_IN_FILE)}


@cache
def _engine_to_ask(url: str) -> Engine:
    """Return the engine for short questions to a server; it keeps no connection open, as its process may be forked."""
    return create_engine(url, poolclass=NullPool)


def check_study_storage(folder: SweepFolder, storage: str | None) -> None:
    """Check that a new sweep's study can be created, without writing anything.

    Args:
        folder: the sweep's folder, which need not exist.
        storage: the sweep's `storage`; None for SQLite in the folder.

    Raises:
        PasswordInUrl, NetworkDisk, NameTaken: as when it is created.
        StorageRefused: the database cannot be reached.
    """
    url = choose_study_url(folder, storage)
    parsed = make_url(url)
    if parsed.get_backend_name() == "sqlite":
        database = Path(parsed.database or "")
        if (kind := filesystem_type(database)) in NETWORK_FILESYSTEMS:
            raise NetworkDisk(database, kind)
    else:
        with _translated_errors(hide_password(url)):
            engine = create_engine(url)
            with engine.connect():
                pass
            engine.dispose()
    if storage is not None and study_exists(url, folder.name):
        raise NameTaken(folder.name, folder.path)


def hide_password(url: str) -> str:
    """Return the URL with its password masked."""
    return make_url(url).render_as_string(hide_password=True)


class StudyDatabase:
    """One sweep's open database. Thread-safe: calls are serialized."""

    def __init__(self, url: str, *, create: bool = False, read_only: bool = False) -> None:
        """`read_only`: nothing is written to an SQLite database, which may belong to another user."""
        self.url = hide_password(url)
        self._read_only = read_only
        self._lock = threading.RLock()
        self._snapshot: Connection | None = None
        """Of the thread that has the lock."""
        self.on_rollback: Callable[[], None] = lambda: None
        """Called after a failed transaction: values read inside it are invalid."""
        parsed = make_url(url)
        self._sqlite = parsed.get_backend_name() == "sqlite"
        database = Path(parsed.database or "")
        if self._sqlite:
            if not create and not database.is_file():
                raise StudyMissing(str(database))
            if (kind := filesystem_type(database)) in NETWORK_FILESYSTEMS:
                raise NetworkDisk(database, kind)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        engine: dict[str, Any] = {"pool_pre_ping": True}
        if self._sqlite and read_only:  # each read opens the file anew, as a driver may begin or end in between
            engine = {"creator": lambda: _connect_to_read(database), "poolclass": NullPool}
        elif self._sqlite:
            engine = {"creator": lambda: _connect(database)}
        with self._translate_errors():
            self.storage = _storage(url, engine, create, read_only=self._sqlite and read_only)
            if create:
                failpoint("study.tables")
                METADATA.create_all(self.storage.engine)

    def upgrade(self) -> None:
        """Create the tables that an earlier version of this program did not have; a reader has them in memory."""
        if self._sqlite and self._read_only:
            return
        with self._lock, self._translate_errors():
            METADATA.create_all(self.storage.engine)

    def dispose(self) -> None:
        """Close the connections."""
        self.storage.scoped_session.remove()
        self.storage.engine.dispose()

    @contextmanager
    def transaction(self) -> Generator[Connection]:
        """Open a transaction in which writes of Optuna's storage and of this package are committed together."""
        try:
            with self._lock, self._translate_errors(), self.storage.engine.connect() as connection, connection.begin():
                if self._sqlite:
                    connection.exec_driver_sql("BEGIN IMMEDIATE")
                failpoint("study.begun")
                with self._share_with_optuna(connection):
                    yield connection
                failpoint("study.commit")
        except BaseException:
            self.on_rollback()
            raise
        failpoint("study.committed")

    @contextmanager
    def separate_transaction(self) -> Generator[Connection]:
        """Open a short transaction on this package's tables only, for other threads than the driver's.

        If it fails, the driver's cache stays valid.
        """
        with self._lock, self._translate_errors(), self.storage.engine.connect() as connection, connection.begin():
            if self._sqlite:
                connection.exec_driver_sql("BEGIN IMMEDIATE")
            yield connection

    @contextmanager
    def snapshot(self) -> Generator[Connection]:
        """Open a read transaction: a consistent snapshot of the database. Inside another one, it is that one."""
        with self._lock, self._translate_errors():
            if self._snapshot is not None:
                yield self._snapshot
                return
            with self.storage.engine.connect() as connection:
                if not self._sqlite:
                    connection.execution_options(isolation_level="REPEATABLE READ")
                with connection.begin():
                    if self._sqlite:
                        connection.exec_driver_sql("BEGIN")
                    with self._share_with_optuna(connection):
                        self._snapshot = connection
                        try:
                            yield connection
                        finally:
                            self._snapshot = None

    @contextmanager
    def _share_with_optuna(self, connection: Connection) -> Generator[None]:
        """SQLAlchemy's recipe for joining a session into an external transaction: its commits become savepoints."""
        sessions = self.storage.scoped_session
        sessions.remove()
        sessions.configure(bind=connection, join_transaction_mode="create_savepoint")
        try:
            yield
        finally:
            sessions.remove()
            sessions.configure(bind=self.storage.engine, join_transaction_mode="conditional_savepoint")

    def _translate_errors(self) -> AbstractContextManager[None]:
        return _translated_errors(self.url)


@contextmanager
def _translated_errors(url: str) -> Generator[None]:
    """Raise errors of the database as StorageRefused. `url`: its address without password."""
    try:
        yield
    except DBAPIError as error:
        raise StorageRefused(f"the study in {url} refused: {error.orig}") from error
    except StorageInternalError as error:
        cause = error.__cause__
        detail = cause.orig if isinstance(cause, DBAPIError) else error
        raise StorageRefused(f"the study in {url} refused: {detail}") from error
    except ImportError as error:
        raise StorageRefused(
            f"the study in {url} needs a driver that is not installed: pip install 'prefsweep[postgresql]'"
        ) from error


class _SqliteReader(RDBStorage):
    """Optuna's storage of an SQLite file that is only read, ready in a fraction of the time.

    RDBStorage's constructor asks for versions, and an engine of its own compiles every statement anew, which takes
    longer than reading a study. All readers of a process share the dialect and the compiled statements.
    """

    def __init__(self, url: str, creator: Callable[[], Any]) -> None:
        dialect, compiled = _dialect_of_readers()
        self.engine = Engine(
            NullPool(creator, dialect=dialect), dialect, make_url(url), execution_options={"compiled_cache": compiled}
        )
        self.scoped_session = scoped_session(sessionmaker(bind=self.engine))


@cache
def _dialect_of_readers() -> tuple[Dialect, dict[Any, Any]]:
    engine = create_engine("sqlite://", poolclass=NullPool)
    with engine.connect():  # initializes the dialect
        return engine.dialect, {}


def _storage(url: str, engine: dict[str, Any], create: bool, *, read_only: bool) -> RDBStorage:
    """Optuna's storage. Its schema check loads all migrations, so it is skipped for tables of the installed version."""
    if read_only:
        storage: RDBStorage = _SqliteReader(url, engine["creator"])
    else:
        storage = RDBStorage(url, engine, skip_compatibility_check=True, skip_table_creation=not create)
    with storage.engine.connect() as connection:
        made_by = connection.execute(text("select library_version from version_info")).scalar_one()
    if made_by == optuna.__version__:
        return storage
    storage.engine.dispose()
    try:
        return RDBStorage(url, engine, skip_table_creation=True)
    except RuntimeError as error:  # Optuna's message names the command that upgrades the study
        raise StorageRefused(str(error)) from error


def _connect(database: Path) -> sqlite3.Connection:
    """Connect without implicit transactions (no isolation level); a commit is on the disk before it returns."""
    connection = sqlite3.connect(database, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")
    return connection


_TABLES = "SELECT name FROM sqlite_master WHERE type = 'table'"


def _connect_to_read(database: Path) -> sqlite3.Connection:
    """Connect so that nothing can be written, also where this user may not write the file or its folder.

    SQLite reads a database with a write-ahead log only where it finds or can create the log's index. Where a driver has
    left neither log nor index and none can be created, the file is complete and is read as it is. An index that says
    too little to a process which may not write it is done without: the files are copied into memory.
    """
    if os.access(database, os.W_OK) and os.access(database.parent, os.W_OK):
        connection = _connect(database)
    else:
        complete = not _log_of(database).exists()
        uri = f"file:{quote(str(database))}?mode=ro{'&immutable=1' if complete else ''}"
        connection = sqlite3.connect(
            uri, uri=True, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False
        )
        try:
            connection.execute(_TABLES)
        except sqlite3.OperationalError:
            connection.close()
            connection = _copy_in_memory(database)
    existing = {name for (name,) in connection.execute(_TABLES)}
    if SWEEP.name in existing:  # of an earlier version, whose missing tables are empty
        connection.execute("PRAGMA temp_store=MEMORY")
        for table in METADATA.sorted_tables:
            if table.name not in existing:
                statement = str(CreateTable(table).compile(dialect=sqlite.dialect()))
                connection.execute(statement.replace("CREATE TABLE", "CREATE TEMP TABLE", 1))
    connection.execute("PRAGMA query_only=ON")
    return connection


def _copy_in_memory(database: Path) -> sqlite3.Connection:
    """Return a copy of the database and its write-ahead log as they are now, while a driver may write to them.

    The copies of the two files fit if none of the log was moved into the database meanwhile: that changes the
    database's time, or the log's header. Raises sqlite3.OperationalError if a file cannot be read.
    """
    log = _log_of(database)

    def state() -> tuple[int, bytes]:
        with log.open("rb") as stream:
            return database.stat().st_mtime_ns, stream.read(32)

    memory = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
    with tempfile.TemporaryDirectory(prefix="orchestrate-") as folder:
        copy = Path(folder) / database.name
        try:
            before, after = (0, b""), state()
            while before != after:
                shutil.copyfile(database, copy)
                shutil.copyfile(log, _log_of(copy))
                before, after = after, state()
        except OSError as error:
            raise sqlite3.OperationalError(f"{error.filename}: {error.strerror}") from error
        with closing(_connect(copy)) as source:
            source.backup(memory)
    return memory


def _log_of(database: Path) -> Path:
    return database.with_name(f"{database.name}-wal")


def create_study(folder: SweepFolder, spec: SweepSpec, terms: SweepTerms, storage: str | None) -> StudyDatabase:
    """Create the database of a sweep in `storage`, else in its folder. Raises NameTaken if the sweep exists there."""
    folder.path.mkdir(parents=True, exist_ok=True)
    database = StudyDatabase(choose_study_url(folder, storage), create=True)
    if storage is not None:
        store_study_url(folder, storage)
    repository, queue = SweepRepository(folder.name), TrialQueue(folder.name)
    directions = [StudyDirection[objective.direction.upper()] for objective in spec.objectives]
    try:
        with database.transaction() as connection:
            if repository.sweep_row(connection) is not None:
                raise NameTaken(folder.name, folder.path)
            study_id = database.storage.create_new_study(directions, folder.name)
            database.storage.set_study_user_attr(study_id, TERMS_KEY, terms.as_json())
            row = {"id": uuid.uuid4().hex, "schema": SCHEMA, "study_id": study_id, "driver": 0}
            connection.execute(insert(SWEEP).values(sweep=folder.name, created_at=time.time(), **row))
            repository.add_spec(connection, spec.model_dump_json(), sweep_terms.full_spec_digest(spec))
            repository.add_event(connection, "created", f"sweep {folder.name}", None)
            for params in spec.enqueue:
                queue.add(connection, params, "given in the file", by_command=False)
    except DuplicatedStudyError:
        raise NameTaken(folder.name, folder.path) from None
    return database


def delete_study(url: str, sweep: str) -> None:
    """Delete a sweep's rows, and its Optuna study, from a database that has other sweeps too; nothing if it is gone."""
    if not study_exists(url, sweep):
        return
    database = StudyDatabase(url)
    try:
        with database.transaction() as connection:
            row = SweepRepository(sweep).sweep_row(connection, lock=True)
            for table in reversed(METADATA.sorted_tables):
                connection.execute(delete(table).where(table.c.sweep == sweep))
            if row is not None:
                database.storage.delete_study(row.study_id)
    finally:
        database.dispose()
