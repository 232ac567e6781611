"""A PostgreSQL server of its own for tests, from Debian's package `postgresql` or what is on the PATH."""

import importlib.util
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import create_engine, make_url

from tests.support.processes import LIMIT_SECONDS

VARIABLE = "PREFSWEEP_TEST_POSTGRESQL"
"""Names a database of another server to write into: postgresql+psycopg://user@host/db."""


def server_programs() -> Path | None:
    """The folder with `initdb` and `pg_ctl`; Debian keeps them off the PATH, one folder for each version."""
    debian = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
    on_path = [Path(found).resolve().parent for name in ("initdb", "pg_ctl") if (found := shutil.which(name))]
    return next((path for path in [*reversed(debian), *on_path] if (path / "initdb").is_file()), None)


def missing() -> str | None:
    """What a PostgreSQL test needs and this machine lacks, with the command that brings it; None where all is here."""
    if importlib.util.find_spec("psycopg") is None:
        return "no psycopg: pip install -c constraints.txt 'prefsweep[postgresql]'"
    if not os.environ.get(VARIABLE) and server_programs() is None:
        return f"no PostgreSQL: apt-get install postgresql, or set {VARIABLE}=postgresql+psycopg://user@host/db"
    return None


@contextmanager
def postgresql_server() -> Generator[str]:
    """Run a server on a socket in a temporary folder and yield its SQLAlchemy URL; skips the test where it cannot."""
    if given := os.environ.get(VARIABLE):
        if reason := missing():
            pytest.skip(reason)
        yield given
        return
    with own_postgresql_server() as server:
        yield server.url


@dataclass(frozen=True)
class OwnServer:
    """A server that the test stops and starts."""

    url: str
    start: Callable[[], None]
    stop: Callable[[], None]
    """Its connections end, as when its machine is started again."""


@contextmanager
def own_postgresql_server() -> Generator[OwnServer]:
    """Run a server as `postgresql_server`, whatever other server is there."""
    if reason := missing():
        pytest.skip(reason)
    programs = server_programs()
    if programs is None:
        pytest.skip("no PostgreSQL of this machine to stop and start")
    with tempfile.TemporaryDirectory(prefix="pg-") as folder:
        # PostgreSQL refuses to run as root; Debian's package makes this user.
        run_as: dict[str, Any] = {"user": "postgres", "group": "postgres"} if os.geteuid() == 0 else {}
        if run_as:
            shutil.chown(folder, **run_as)

        def run(program: str, *arguments: str) -> None:
            # Output goes to a file: the server inherits it, and a pipe would stay open as long as the server runs.
            log = Path(folder, f"{program}.log")
            with log.open("ab") as output:
                command = [str(programs / program), "-D", f"{folder}/data", *arguments]
                done = subprocess.run(
                    command, cwd=folder, stdout=output, stderr=output, timeout=LIMIT_SECONDS, check=False, **run_as
                )
            assert done.returncode == 0, log.read_text()

        def start() -> None:
            run("pg_ctl", "-w", "-o", f"-F -k {folder} -c listen_addresses=''", "start")

        def stop() -> None:
            run("pg_ctl", "-w", "-m", "immediate", "stop")

        run("initdb", "--username=sweeps", "--auth=trust", "--encoding=UTF8", "--no-locale", "--no-sync")
        start()
        try:
            yield OwnServer(f"postgresql+psycopg://sweeps@/postgres?host={folder}", start, stop)
        finally:
            stop()


@contextmanager
def postgresql_schemas() -> Generator[Callable[[], str]]:
    """Run one server for many tests; each call gives the URL of an empty schema."""
    with postgresql_server() as url:
        engine, names = create_engine(url, isolation_level="AUTOCOMMIT"), list[str]()

        def new() -> str:
            names.append(f"prefsweep_{uuid4().hex[:12]}")
            with engine.connect() as connection:
                connection.exec_driver_sql(f"CREATE SCHEMA {names[-1]}")
            found = make_url(url).update_query_dict({"options": f"-csearch_path={names[-1]}"})
            return found.render_as_string(hide_password=False)

        yield new
        with engine.connect() as connection:
            for name in names:
                connection.exec_driver_sql(f"DROP SCHEMA {name} CASCADE")
        engine.dispose()
