"""Atomic writes: a file is complete or absent, even if the process is killed (temporary file, fsync, rename)."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

from trainer.storage.failpoints import failpoint

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


def digest_of_stream(name: str, size: int, stream: IO[bytes]) -> str:
    """Return `sha256_of` of one file from its name, its size and its content."""
    digest = hashlib.sha256(f"{name}\0{size}\0".encode())
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
