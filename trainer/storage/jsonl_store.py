"""`JsonlStore`: append-only JSON lines by key, for results that cost time or money; survives a kill at any instant."""

from __future__ import annotations

import json
import logging
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from trainer.storage.atomic_files import FileLock, failpoint, fsync

log = logging.getLogger(__name__)


class JsonlStore:
    """Values by key. What `put` returned from is on the disk; a torn end, or a damaged line and all behind it, is set
    aside on opening. One process has the file at a time, others wait for it.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._lock = FileLock(path)
        self._lock.acquire()
        self._values, self._end = _read(path)
        if self._end < os.lseek(self._file, 0, os.SEEK_END):
            self._move_damaged_tail()
        fsync(path.parent)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, reason: BaseException | None, at: TracebackType | None
    ) -> None:
        os.close(self._file)
        self._lock.release()

    @property
    def values(self) -> Mapping[str, Any]:
        """Everything known."""
        return self._values

    def put(self, values: Mapping[str, Any]) -> None:
        """Remember these JSON values; OSError where the disk refuses, and then none of them is kept."""
        lines = b"".join(_line(key, value) for key, value in values.items())
        failpoint("kept.append")
        try:
            written = 0
            while written < len(lines):
                written += os.pwrite(self._file, lines[written:], self._end + written)
            os.fsync(self._file)
        except OSError:
            os.ftruncate(self._file, self._end)
            raise
        self._end += len(lines)
        self._values |= json.loads(json.dumps(dict(values)))
        failpoint("kept.appended")

    def _move_damaged_tail(self) -> None:
        with self._path.open("rb") as stream:
            stream.seek(self._end)
            rest = stream.read()
        temporary = self._path.with_name(f"{self._path.name}.torn-{self._end}")
        temporary.write_bytes(rest)
        os.ftruncate(self._file, self._end)
        os.fsync(self._file)
        log.warning("%s: %d bytes at its end are no whole line and were set aside", self._path, len(rest))


def read_jsonl_store(path: Path) -> dict[str, Any]:
    """What the file holds now; nothing where there is none. Takes no lock and changes nothing."""
    return _read(path)[0] if path.is_file() else {}


def _line(key: str, value: Any) -> bytes:
    body = json.dumps([key, value], allow_nan=False, separators=(",", ":"))
    return f"{zlib.crc32(body.encode()):08x} {body}\n".encode()


def _read(path: Path) -> tuple[dict[str, Any], int]:
    """The values of all whole lines from the beginning on, and where the last of them ends."""
    values: dict[str, Any] = {}
    end = 0
    with path.open("rb") as stream:
        for line in stream:
            if not line.endswith(b"\n") or line[:8] != f"{zlib.crc32(line[9:-1]):08x}".encode():
                break
            key, value = json.loads(line[9:])
            values[key] = value
            end += len(line)
    return values, end
