"""`FileLock`: exclusive lock on a file, which the operating system releases when its holder dies."""

from __future__ import annotations

import fcntl
import time
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO, Self

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
