"""`JsonlStore`: append-only JSON lines by key, for results that cost time or money; safe against a kill at any time."""

from __future__ import annotations

import json
import logging
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from trainer.storage.atomic_files import fsync
from trainer.storage.failpoints import failpoint
from trainer.storage.file_lock import FileLock

log = logging.getLogger(__name__)


class JsonlStore:
    """Persistent values by key. Values are on disk when `put` returns. On opening, an incomplete last line, or a
    damaged line with everything after it, is moved to another file. Opening waits for an exclusive lock.
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
        """All stored values."""
        return self._values

    def put(self, values: Mapping[str, Any]) -> None:
        """Store JSON values. Raises OSError if the disk cannot be written; then none of them is stored."""
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
            tail = stream.read()
        torn = self._path.with_name(f"{self._path.name}.torn-{self._end}")
        torn.write_bytes(tail)
        os.ftruncate(self._file, self._end)
        os.fsync(self._file)
        message = "%s: %d bytes at its end are not a complete line and were moved to %s"
        log.warning(message, self._path, len(tail), torn.name)


def read_jsonl_store(path: Path) -> dict[str, Any]:
    """Return the values in the file; {} if it does not exist. Takes no lock and changes nothing."""
    return _read(path)[0] if path.is_file() else {}


def _line(key: str, value: Any) -> bytes:
    body = json.dumps([key, value], allow_nan=False, separators=(",", ":"))
    return f"{zlib.crc32(body.encode()):08x} {body}\n".encode()


def _read(path: Path) -> tuple[dict[str, Any], int]:
    """Return the values of all valid lines from the start, and the offset after the last of them."""
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
