"""Storage that refuses: a database whose lock another process holds, a small file system of its own; queries."""

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

import pytest
from sqlalchemy import Engine, event


@contextmanager
def counted_queries() -> Generator[list[str]]:
    """The statements that any database gets meanwhile."""
    seen: list[str] = []

    def note(*arguments: object) -> None:
        seen.append(str(arguments[2]))

    event.listen(Engine, "before_cursor_execute", note)
    try:
        yield seen
    finally:
        event.remove(Engine, "before_cursor_execute", note)


@contextmanager
def write_locked(database: Path, seconds: float = 3600.0) -> Generator[None]:
    """Another program holds the database's write lock: for so long, or until this is left."""
    ready_r, ready_w = os.pipe()
    child = os.fork()
    if child == 0:
        other = sqlite3.connect(database, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        os.write(ready_w, b"x")
        time.sleep(seconds)
        os._exit(0)
    os.read(ready_r, 1)
    os.close(ready_r)
    os.close(ready_w)
    try:
        yield
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def require_mounts() -> None:
    """Skip the test where this user may not mount a file system."""
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-rm", "true"], check=False).returncode:
        pytest.skip("this system lets nobody mount a small disk")


def on_small_disk(disk: Path, size: str, scenario: Callable[[Path], None]) -> None:
    """Call a function of a test module, in a process of its own, with a folder that is a disk of this size."""
    require_mounts()
    disk.mkdir()
    code = (
        f"from {scenario.__module__} import {scenario.__name__} as run; from pathlib import Path; run(Path('{disk}'))"
    )
    shell = f"mount -t tmpfs -o size={size} none '{disk}' && exec '{sys.executable}' -c \"{code}\""
    # In a process namespace of its own: whatever the scenario has started ends with it.
    space = ["unshare", "-rm", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c"]
    done = subprocess.run([*space, shell], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def fill(disk: Path) -> Path:
    """Write a file that takes what is free; return it."""
    ballast = disk / "ballast"
    with ballast.open("ab", buffering=0) as out:
        for block in (1 << 16, 1):
            try:
                while True:
                    out.write(bytes(block))
            except OSError:  # full
                continue
    return ballast
