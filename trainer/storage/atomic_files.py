"""Files that are either whole or absent, whatever kills the process: written aside, flushed to the disk, renamed.

One process at a time: a lock that the operating system frees when its holder dies.

Where tests kill a process: with `ORCHESTRATE_FAILPOINT=file.rename:3` the third pass of that point is its last.

A point stands before or after each step of a write that has to be whole or absent. Without the variable it is nothing.
"""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import json
import os
import shutil
import signal
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

VARIABLE = "ORCHESTRATE_FAILPOINT"
_passes: dict[str, Iterator[int]] = {}


def failpoint(name: str) -> None:
    """SIGKILL to this process where the variable names this point and this pass."""
    asked = os.environ.get(VARIABLE)
    if asked is None:
        return
    point, _, last = asked.partition(":")
    if point == name and next(_passes.setdefault(name, itertools.count(1))) == int(last or 1):
        os.kill(os.getpid(), signal.SIGKILL)


_BLOCK = 1 << 20


def sha256_of(files: Iterable[Path]) -> str:
    """Hex digest over the names' and the contents' bytes of the files, in the order given."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as stream:
            while block := stream.read(_BLOCK):
                digest.update(block)
    return digest.hexdigest()


def digest_of(value: Any) -> str:
    """Hex digest of a JSON value; equal values have equal digests, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def sync(path: Path) -> None:
    """Ask the operating system to put a file, or a folder's list of names, on the disk now."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_file(path: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write a file aside in the same folder, then give it its name. OSError where the disk refuses."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{uuid4().hex[:8]}.tmp")
    try:
        fill(aside)
        sync(aside)
        failpoint("file.rename")
        aside.replace(path)
        failpoint("file.renamed")
        sync(path.parent)
    finally:
        aside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """`write_file` for text in UTF-8."""
    write_file(path, lambda aside: _put_text(aside, text))


def _put_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """`write_file` for a JSON value; ValueError for NaN and infinity, which JSON does not know."""
    write_text(path, json.dumps(value, allow_nan=False, indent=1))


def write_folder(path: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write a folder aside, flush every file in it, then give it its name; one of that name is replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{uuid4().hex[:8]}.tmp")
    aside.mkdir()
    try:
        fill(aside)
        failpoint("folder.sync")
        for inner in sorted(aside.rglob("*")):
            sync(inner)
        sync(aside)
        if path.exists():
            shutil.rmtree(path)
        failpoint("folder.rename")
        aside.rename(path)
        failpoint("folder.renamed")
        sync(path.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def held(path: Path) -> Generator[None]:
    """Hold an exclusive lock on `path` (made when absent, never removed); waits for whoever holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(handle, fcntl.LOCK_UN)
