"""Standard output and error whose closed readers and narrow encodings change no result."""

from __future__ import annotations

import codecs
import errno
import io
import os
import shutil
import signal
import sys
import textwrap
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

TERMINATION_SIGNALS = (signal.SIGTERM, signal.SIGHUP)
"""Sent by schedulers and by a terminal that closes."""
_LOST = frozenset({errno.EPIPE, errno.EIO, errno.EBADF, errno.ENXIO})
"""Errors of a write whose reader has ended: a closed pipe, a closed terminal."""
_ASCII = dict(zip("–─━│·…★±▁▂▃▄▅▆▇█", "--=||~*~12345678", strict=True))
"""One character each, so that columns stay aligned."""
_HANDLER = "prefsweep-ascii"


class _Output(io.RawIOBase):
    """A file descriptor that is replaced by /dev/null once its reader has ended.

    `drops_all`: other failed writes, as to a full disk, are dropped too; else they are raised.
    """

    def __init__(self, fd: int, *, drops_all: bool) -> None:
        super().__init__()
        self._fd, self.drops_all = fd, drops_all

    def write(self, data: Any, /) -> int:
        try:
            return os.write(self._fd, data)
        except OSError as error:
            if error.errno in _LOST:
                sink = os.open(os.devnull, os.O_WRONLY)
                os.dup2(sink, self._fd)  # for child processes too
                os.close(sink)
            elif not self.drops_all:
                raise
        return memoryview(data).nbytes

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._fd

    def isatty(self) -> bool:
        return os.isatty(self._fd)


@contextmanager
def safe_streams() -> Generator[None]:
    """Replace `sys.stdout` and `sys.stderr` in the context; streams that are no files, as in tests, are left alone.

    Characters that the encoding lacks are written in ASCII. What a lost reader does not read is dropped. Closed
    descriptors are opened on /dev/null, else the next file that is opened would receive the output.
    """
    codecs.register_error(_HANDLER, _replace)
    for fd in (0, 1, 2):
        _open_if_closed(fd)
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (_safe(stream, fd) for fd, stream in enumerate(before, start=1))
    try:
        yield
    finally:
        drop_failed_output()  # what `main` could not write has been reported
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        sys.stdout, sys.stderr = before


def drop_failed_output() -> None:
    """From now on drop what cannot be written, as to a full disk: a sweep continues without its log."""
    if isinstance(sys.stdout, io.TextIOWrapper) and isinstance(raw := getattr(sys.stdout.buffer, "raw", None), _Output):
        raw.drops_all = True


def encodes_unicode(stream: TextIO) -> bool:
    """Return whether the stream's encoding has all characters."""
    return (stream.encoding or "utf-8").lower().startswith("utf")


def _safe(stream: TextIO | None, fd: int) -> TextIO:
    if stream is None:  # the descriptor was closed when Python started
        return _text(fd, "utf-8", line_buffering=False)
    if type(stream) is not io.TextIOWrapper:
        return stream
    try:
        number = stream.fileno()
    except OSError:
        return stream
    stream.flush()
    return _text(number, stream.encoding, line_buffering=number == 2 or stream.isatty())


def _text(fd: int, encoding: str, *, line_buffering: bool) -> io.TextIOWrapper:
    output = io.BufferedWriter(_Output(fd, drops_all=fd == 2))
    return io.TextIOWrapper(output, encoding=encoding, errors=_HANDLER, line_buffering=line_buffering)


def _open_if_closed(fd: int) -> None:
    try:
        os.fstat(fd)
    except OSError:
        os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is `fd`


def _replace(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(_substitutes(error.object[error.start : error.end])), error.end


def _substitutes(text: str) -> Iterator[str]:
    for character in text:
        yield _ASCII.get(character, "?")


def wrapped(text: str) -> str:
    """Return a message for standard error with its lines broken between words, as wide as the terminal is.

    Unchanged where standard error is no terminal; a path longer than a line stays in one piece.
    """
    if not sys.stderr.isatty():
        return text
    width = max(40, shutil.get_terminal_size().columns)
    return "\n".join(_wrapped_line(line, width) for line in text.split("\n"))


def _wrapped_line(line: str, width: int) -> str:
    indent = line[: len(line) - len(line.lstrip())] + "  "
    if len(line) <= width:
        return line
    return textwrap.fill(
        line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False, replace_whitespace=False
    )
