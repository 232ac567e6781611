"""Tracking messages and their journal on disk: one JSON object per line, numbered, with a checksum.

Lines are appended and flushed to disk and read by offset; only an incomplete last line is repaired.
"""

from __future__ import annotations

import json
import logging
import math
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, assert_never

from orchestrator.errors import StorageRefused
from orchestrator.interfaces import TrackingReceiver
from trainer.results import StepMetrics
from trainer.storage.atomic_files import fsync


@dataclass(frozen=True, slots=True)
class StartRun:
    """Start a run."""

    run: str
    name: str
    params: Mapping[str, Any]
    tags: Mapping[str, str]
    at: float


@dataclass(frozen=True, slots=True)
class LogMetrics:
    """Log metrics at their steps."""

    run: str
    metrics: Sequence[StepMetrics]
    at: float


@dataclass(frozen=True, slots=True)
class LogFinalMetrics:
    """Log values that are no time series."""

    run: str
    values: Mapping[str, float]
    step: int
    at: float


@dataclass(frozen=True, slots=True)
class SetTags:
    """Set tags of a run."""

    run: str
    tags: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class LogArtifact:
    """Attach a file to a run."""

    run: str
    path: Path
    folder: str


@dataclass(frozen=True, slots=True)
class EndRun:
    """End a run."""

    run: str
    status: str
    tags: Mapping[str, str]
    at: float


TrackingMessage = StartRun | LogMetrics | LogFinalMetrics | SetTags | LogArtifact | EndRun

_CRC = b',"crc":"'
_TAIL = len(_CRC) + 8 + len(b'"}')


class InvalidLine(Exception):
    """The bytes are not a message with a valid checksum."""


def deliver(receiver: TrackingReceiver, message: TrackingMessage) -> None:
    """Call the receiver's method for the message."""
    match message:
        case StartRun(run, name, params, tags, at):
            receiver.start_run(run, name=name, params=params, tags=tags, at=at)
        case LogMetrics(run, metrics, at):
            receiver.log_metrics(run, metrics, at=at)
        case LogFinalMetrics(run, values, step, at):
            receiver.log_final_metrics(run, values, step=step, at=at)
        case SetTags(run, tags):
            receiver.set_tags(run, tags)
        case LogArtifact(run, path, folder):
            receiver.log_artifact(run, path, folder)
        case EndRun(run, status, tags, at):
            receiver.end_run(run, status=status, tags=tags, at=at)
        case _:
            assert_never(message)


def stored_path(path: Path, sweep: Path) -> Path:
    """Return a path inside the sweep's folder relative to it."""
    return path.relative_to(sweep) if path.is_relative_to(sweep) else path


def with_present_path(message: TrackingMessage, sweep: Path) -> TrackingMessage:
    """Return the message with the place of its file now.

    Earlier versions stored absolute paths. One outside of the sweep's folder is replaced by the file of the same place
    in it, if there is one: then the folder was moved or copied.
    """
    if not isinstance(message, LogArtifact):
        return message
    path = message.path
    if not path.is_absolute():
        return replace(message, path=sweep / path)
    if not path.is_relative_to(sweep) and sweep.name in path.parts:
        last = len(path.parts) - 1 - path.parts[::-1].index(sweep.name)
        here = sweep.joinpath(*path.parts[last + 1 :])
        return replace(message, path=here if here.exists() else path)
    return message


def encode(seq: int, message: TrackingMessage) -> bytes:
    """Return the message as one line, with its number, checksum and newline."""
    body = json.dumps({"seq": seq, **to_json(message)}, ensure_ascii=True, allow_nan=False).encode()
    return body[:-1] + _CRC + f"{zlib.crc32(body):08x}".encode() + b'"}\n'


def decode(line: bytes) -> tuple[int, TrackingMessage]:
    """Return number and message of a line without its newline. Raises InvalidLine if its checksum is wrong."""
    body, tail = line[:-_TAIL] + b"}", line[-_TAIL:]
    if (
        not tail.startswith(_CRC)
        or not tail.endswith(b'"}')
        or tail[len(_CRC) : -2] != f"{zlib.crc32(body):08x}".encode()
    ):
        raise InvalidLine
    fields: dict[str, Any] = json.loads(body)
    return fields.pop("seq"), from_json(fields)


def to_json(message: TrackingMessage) -> dict[str, Any]:
    """Return the message as JSON values, with NaN and infinities as text."""
    match message:
        case StartRun(run, name, params, tags, at):
            return {"do": "start", "run": run, "name": name, "params": _plain(params), "tags": dict(tags), "at": at}
        case LogMetrics(run, metrics, at):
            return {"do": "points", "run": run, "points": [[p.step, _plain(p.metrics)] for p in metrics], "at": at}
        case LogFinalMetrics(run, values, step, at):
            return {"do": "values", "run": run, "values": _plain(values), "step": step, "at": at}
        case SetTags(run, tags):
            return {"do": "tag", "run": run, "tags": dict(tags)}
        case LogArtifact(run, path, folder):
            return {"do": "artifact", "run": run, "path": str(path), "folder": folder}
        case EndRun(run, status, tags, at):
            return {"do": "end", "run": run, "status": status, "tags": dict(tags), "at": at}
        case _:
            assert_never(message)


def from_json(fields: dict[str, Any]) -> TrackingMessage:
    """Return the message that `to_json` wrote."""
    kind = fields.pop("do")
    if kind == "points":
        history = [StepMetrics(step, {n: float(v) for n, v in metrics.items()}) for step, metrics in fields["points"]]
        return LogMetrics(fields["run"], history, fields["at"])
    if kind == "values":
        values = {name: float(value) for name, value in fields["values"].items()}
        return LogFinalMetrics(fields["run"], values, fields["step"], fields["at"])
    if kind == "artifact":
        return LogArtifact(fields["run"], Path(fields["path"]), fields["folder"])
    return {"start": StartRun, "tag": SetTags, "end": EndRun}[kind](**fields)


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {n: str(v) if isinstance(v, float) and not math.isfinite(v) else v for n, v in values.items()}


_log = logging.getLogger(__name__)

_LONGEST_LINE = 1 << 24
"""Bytes that are searched for the beginning of a message."""


class JournalDamaged(StorageRefused):
    """A message before the last one is damaged; skipping it would deliver messages out of order."""

    def __init__(self, path: Path, offset: int) -> None:
        self.path, self.offset = path, offset
        super().__init__(f"{path} is damaged at byte {offset}; move it away to continue (the study has all metrics)")


class Journal:
    """Append-only file of messages. An append is atomic and on disk when it returns."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.last = 0
        """Number of the last message."""
        self.name = ""
        """Digest of the first message, which identifies the journal in `delivered.json`; "" while there is none."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        self.end = os.lseek(self._file, 0, os.SEEK_END)
        fsync(path.parent)

    def scan(self) -> Iterator[tuple[int, TrackingMessage]]:
        """Yield every message with its number; called once, on opening. A torn end is moved to a file of its own."""
        offset = 0
        with self.path.open("rb") as stream:
            for line in stream:
                found = self._is_intact(line)
                if found is None:
                    break
                self._note_line(found[0], line)
                offset += len(line)
                yield found
        if offset < self.end:
            self._move_torn_tail(offset)

    def append(self, message: TrackingMessage) -> None:
        """Append a message and flush it to disk. Raises StorageRefused and appends nothing if the disk refuses."""
        line = encode(self.last + 1, message)
        try:
            _write_at(self._file, line, self.end)
            os.fsync(self._file)
        except OSError as error:
            os.ftruncate(self._file, self.end)
            raise StorageRefused(f"{self.path} refused: {error.strerror}") from error
        self._note_line(self.last + 1, line)
        self.end += len(line)

    def has_message_end(self, seq: int, offset: int) -> bool:
        """Return whether message number `seq` ends at this offset; (0, 0) is the beginning."""
        if not 0 < offset <= self.end:
            return (seq, offset) == (0, 0)
        with self.path.open("rb") as stream:
            stream.seek(max(0, offset - _LONGEST_LINE))
            lines = stream.read(min(offset, _LONGEST_LINE)).splitlines(keepends=True)
        try:
            return lines[-1].endswith(b"\n") and decode(lines[-1][:-1])[0] == seq
        except InvalidLine:
            return False

    def read(self, offset: int, end: int, limit: int) -> list[tuple[TrackingMessage, int]]:
        """Return 1 to `limit` messages from `offset` on, before `end`, each with the offset of the next one.

        Raises JournalDamaged if the first one is damaged.
        """
        found: list[tuple[TrackingMessage, int]] = []
        with self.path.open("rb") as stream:
            stream.seek(offset)
            while offset < end and len(found) < limit:
                line = stream.readline()
                try:
                    _, message = decode(line.rstrip(b"\n"))
                except InvalidLine:
                    if found:  # return these first
                        break
                    raise JournalDamaged(self.path, offset) from None
                offset += len(line)
                found.append((message, offset))
        return found

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)

    def _note_line(self, seq: int, line: bytes) -> None:
        if not self.name:
            self.name = sha256(line).hexdigest()[:16]
        self.last = seq

    def _is_intact(self, line: bytes) -> tuple[int, TrackingMessage] | None:
        if not line.endswith(b"\n"):
            return None
        try:
            seq, message = decode(line[:-1])
        except InvalidLine:
            return None
        return (seq, message) if seq == self.last + 1 else None

    def _move_torn_tail(self, offset: int) -> None:
        """Move an incomplete end to its own file; an end that contains an intact message is damage."""
        with self.path.open("rb") as stream:
            stream.seek(offset)
            torn = stream.read()
        for line in torn.split(b"\n")[:-1]:
            try:
                decode(line)
            except InvalidLine:
                continue
            raise JournalDamaged(self.path, offset)
        torn_file = self.path.with_name(f"{self.path.name}.torn-{offset}")
        torn_file.write_bytes(torn)
        os.ftruncate(self._file, offset)
        os.fsync(self._file)
        self.end = offset
        _log.warning("%s: a torn message of %d bytes at its end was moved to %s", self.path, len(torn), torn_file.name)


def _write_at(file: int, data: bytes, offset: int) -> None:
    written = 0
    while written < len(data):
        written += os.pwrite(file, data[written:], offset + written)
