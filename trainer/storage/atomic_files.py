"""Atomic writes: a file is complete or absent, even if the process is killed (temporary file, fsync, rename).

Also a file lock that the operating system releases when its holder dies, and failpoints, at which tests kill a process:
with `ORCHESTRATE_FAILPOINT=file.rename:3` the process is killed when it reaches that point for the third time. Without
the variable failpoints do nothing.
"""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO, Self
from uuid import uuid4

FAILPOINT_VARIABLE = "ORCHESTRATE_FAILPOINT"
_passes: dict[str, Iterator[int]] = {}


def failpoint(name: str) -> None:
    """Send SIGKILL to this process if the variable names this point and this pass."""
    configured = os.environ.get(FAILPOINT_VARIABLE)
    if configured is None:
        return
    point, _, last = configured.partition(":")
    if point == name and next(_passes.setdefault(name, itertools.count(1))) == int(last or 1):
        os.kill(os.getpid(), signal.SIGKILL)


_BLOCK = 1 << 20


def sha256_of(files: Iterable[Path]) -> str:
    """Return a hex digest over names and contents of the files, in the given order."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as stream:
            while block := stream.read(_BLOCK):
                digest.update(block)
    return digest.hexdigest()


def digest_of(value: Any) -> str:
    """Return a hex digest of a JSON value, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def fsync(path: Path) -> None:
    """Flush a file, or a folder's entries, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_file(path: Path, write: Callable[[Path], None]) -> None:
    """Have `write` write a temporary file in the same folder, then rename it to `path`. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid4().hex[:8]}.tmp")
    try:
        write(temporary)
        fsync(temporary)
        failpoint("file.rename")
        temporary.replace(path)
        failpoint("file.renamed")
        fsync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text with `write_file`."""
    write_file(path, lambda temporary: _write_text(temporary, text))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON value with `write_file`. Raises ValueError for NaN and infinity."""
    write_text(path, json.dumps(value, allow_nan=False, indent=1))


def write_folder(path: Path, write: Callable[[Path], None]) -> None:
    """Have `write` fill a temporary folder, flush every file, then rename it to `path`, replacing an old folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid4().hex[:8]}.tmp")
    temporary.mkdir()
    try:
        write(temporary)
        failpoint("folder.sync")
        for inner in sorted(temporary.rglob("*")):
            fsync(inner)
        fsync(temporary)
        if path.exists():
            shutil.rmtree(path)
        failpoint("folder.rename")
        temporary.rename(path)
        failpoint("folder.renamed")
        fsync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


_LOCK_POLL_SECONDS = 0.02


class FileLock:
    """Exclusive lock on a file, which the operating system releases when its holder ends in any way.

    The file is created if missing and never removed. As a context manager it waits for another holder without limit.
    """

    def __init__(self, path: Path, holder: str = "") -> None:
        """holder: text in the file while the lock is held; if empty, the file is not written to."""
        self._path, self._text = path, holder
        self._file: BinaryIO | None = None

    def acquire(self, timeout: float | None = None) -> bool:
        """Take the lock; False if another holder still has it after `timeout` seconds. None waits without limit."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            file = stack.enter_context(self._path.open("a+b", buffering=0))
            if not _flock(file, timeout):
                return False
            if self._text:
                file.truncate(0)
                file.write(self._text.encode())
            stack.pop_all()
        self._file = file
        return True

    def release(self) -> None:
        """Release the lock; no effect if it is not held."""
        if self._file is None:
            return
        with self._file as file:
            self._file = None
            if self._text:
                file.truncate(0)
            fcntl.flock(file, fcntl.LOCK_UN)  # a forked process may have the file open too

    def holder(self) -> str | None:
        """Return the holder's text, empty if it wrote none yet; None if the lock is free."""
        if not self._path.exists():
            return None
        with self._path.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return file.read().decode(errors="replace").strip()
        return None

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def _flock(file: BinaryIO, timeout: float | None) -> bool:
    if timeout is None:
        fcntl.flock(file, fcntl.LOCK_EX)
        return True
    until = time.monotonic() + timeout
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= until:
                return False
            time.sleep(_LOCK_POLL_SECONDS)
        else:
            return True
