"""Messages that cannot be delivered while others can, on disk; and what waits in an outbox, for commands that look."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.tracking.message_journal import (
    EndRun,
    InvalidLine,
    LogArtifact,
    StartRun,
    TrackingMessage,
    decode,
    encode,
    from_json,
    to_json,
)
from trainer.storage.atomic_files import write_json

MESSAGES, POSITION, REFUSED = "messages.jsonl", "delivered.json", "refused.jsonl"
"""Files of an outbox: all messages, how far they are delivered, those that are refused for good."""
_DEFERRED = "deferred.json"


class DeferredMessages:
    """Messages of an outbox that were passed over: files to attach are tried again, all others are refused for good."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        stored = _read_deferred(folder)
        self._waiting = [(int(seq), from_json(dict(message))) for seq, message in stored.get("waiting", [])]
        self.refused = _count_lines(folder / REFUSED)
        """Number of messages in `refused.jsonl`."""
        self.reason = str(stored.get("reason", ""))
        """Why the last of them was passed over."""

    @property
    def waiting(self) -> list[tuple[int, TrackingMessage]]:
        """Messages to be tried again, with their numbers."""
        return list(self._waiting)

    def add(self, seq: int, message: TrackingMessage, reason: str) -> None:
        """Pass over a message that fails alone; on disk when this returns."""
        if isinstance(message, LogArtifact):
            if (seq, message) not in self._waiting:
                self._waiting.append((seq, message))
            self._write(reason)
        else:
            self.refuse(seq, message, reason)

    def refuse(self, seq: int, message: TrackingMessage, reason: str) -> None:
        """Move a message to `refused.jsonl`."""
        with (self._folder / REFUSED).open("ab") as stream:
            stream.write(encode(seq, message))
        self.refused += 1
        self._waiting = [one for one in self._waiting if one != (seq, message)]
        self._write(reason)

    def remove(self, seq: int, message: TrackingMessage) -> None:
        """Forget a message that was delivered after all."""
        self._waiting = [one for one in self._waiting if one != (seq, message)]
        self._write(self.reason if self._waiting or self.refused else "")

    def _write(self, reason: str) -> None:
        self.reason = reason
        waiting = [[seq, to_json(message)] for seq, message in self._waiting]
        write_json(self._folder / _DEFERRED, {"waiting": waiting, "reason": reason})


@dataclass(frozen=True, slots=True)
class OutboxState:
    """What an outbox holds: messages to deliver, files passed over that are tried again, messages refused for good."""

    pending: int
    deferred: int
    refused: int
    reason: str

    def as_json(self) -> dict[str, Any]:
        """Return the state as `status --json` has it."""
        return {
            "waiting": self.pending,
            "deferred": self.deferred,
            "refused": self.refused,
            "reason": self.reason,
        }


def outbox_state(folder: Path) -> OutboxState | None:
    """Return the state of an outbox without opening it; None if there is none or this user may not read it."""
    try:
        lines = _lines(folder)
        stored = _read_deferred(folder)
        pending = sum(len(line) > 0 for line in lines[_delivered(folder, lines) :])
        refused = _count_lines(folder / REFUSED)
    except (FileNotFoundError, PermissionError):
        return None
    return OutboxState(pending, len(stored.get("waiting", [])), refused, str(stored.get("reason", "")))


def is_run_open(folder: Path, run: str) -> bool:
    """Return whether MLflow shows this run as running: its last start or end is a start, or an end not delivered yet.

    False where there is no outbox or this user may not read it.
    """
    try:
        lines = _lines(folder)
    except (FileNotFoundError, PermissionError):
        return False
    delivered = _delivered(folder, lines)
    for index in range(len(lines) - 1, -1, -1):
        found = _start_or_end(lines[index], run)
        if found is not None:
            return isinstance(found, StartRun) or index >= delivered
    return False


def open_runs(folder: Path) -> list[str]:
    """Return the runs of an outbox that were started and not ended, in the order of their starts."""
    found: dict[str, None] = {}
    for line in _lines(folder):
        message = _start_or_end(line)
        if isinstance(message, StartRun):
            found[message.run] = None
        elif message is not None:
            found.pop(message.run, None)
    return list(found)


def _start_or_end(line: bytes, run: str = "") -> StartRun | EndRun | None:
    if (b'"do": "start"' not in line and b'"do": "end"' not in line) or run.encode() not in line:
        return None
    try:
        _, message = decode(line)
    except InvalidLine:
        return None
    return message if isinstance(message, (StartRun, EndRun)) and run in ("", message.run) else None


def _lines(folder: Path) -> list[bytes]:
    """Return the journal's complete lines, without their ends."""
    return (folder / MESSAGES).read_bytes().split(b"\n")[:-1]


def _delivered(folder: Path, lines: list[bytes]) -> int:
    """Return how many of these lines are delivered."""
    try:
        offset = int(json.loads((folder / POSITION).read_text(encoding="utf-8"))["offset"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return 0
    position = 0
    for index, line in enumerate(lines):
        if position >= offset:
            return index
        position += len(line) + 1
    return len(lines)


def _read_deferred(folder: Path) -> Mapping[str, Any]:
    path = folder / _DEFERRED
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _count_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.is_file() else 0
