"""What the driver told, as lines on the disk: one JSON object each, numbered, with a checksum."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, assert_never

from orchestrator.tracking.sink import Receiver
from trainer.report import Point


@dataclass(frozen=True, slots=True)
class Start:
    """A run begins."""

    run: str
    name: str
    params: Mapping[str, Any]
    tags: Mapping[str, str]
    at: float


@dataclass(frozen=True, slots=True)
class Points:
    """Metrics at their steps."""

    run: str
    points: Sequence[Point]
    at: float


@dataclass(frozen=True, slots=True)
class Values:
    """Numbers without a course."""

    run: str
    values: Mapping[str, float]
    step: int
    at: float


@dataclass(frozen=True, slots=True)
class Tag:
    """Tags of a run."""

    run: str
    tags: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Artifact:
    """A file of a run."""

    run: str
    path: Path
    folder: str


@dataclass(frozen=True, slots=True)
class End:
    """A run is over."""

    run: str
    status: str
    tags: Mapping[str, str]
    at: float


Message = Start | Points | Values | Tag | Artifact | End

_CRC = b',"crc":"'
_TAIL = len(_CRC) + 8 + len(b'"}')


class BadLine(Exception):
    """Bytes that are no message."""


def tell(receiver: Receiver, message: Message) -> None:
    """The call that the message stands for."""
    match message:
        case Start(run, name, params, tags, at):
            receiver.start(run, name=name, params=params, tags=tags, at=at)
        case Points(run, points, at):
            receiver.points(run, points, at=at)
        case Values(run, values, step, at):
            receiver.values(run, values, step=step, at=at)
        case Tag(run, tags):
            receiver.tag(run, tags)
        case Artifact(run, path, folder):
            receiver.artifact(run, path, folder)
        case End(run, status, tags, at):
            receiver.end(run, status=status, tags=tags, at=at)
        case _:
            assert_never(message)


def encode(seq: int, message: Message) -> bytes:
    """One line, newline included."""
    body = json.dumps({"seq": seq, **to_json(message)}, ensure_ascii=True, allow_nan=False).encode()
    return body[:-1] + _CRC + f"{zlib.crc32(body):08x}".encode() + b'"}\n'


def decode(line: bytes) -> tuple[int, Message]:
    """The number and the message of a line without its newline; BadLine where a bit is wrong."""
    body, tail = line[:-_TAIL] + b"}", line[-_TAIL:]
    if (
        not tail.startswith(_CRC)
        or not tail.endswith(b'"}')
        or tail[len(_CRC) : -2] != f"{zlib.crc32(body):08x}".encode()
    ):
        raise BadLine
    fields: dict[str, Any] = json.loads(body)
    return fields.pop("seq"), from_json(fields)


def to_json(message: Message) -> dict[str, Any]:
    """The message as JSON; NaN and the infinities as text."""
    match message:
        case Start(run, name, params, tags, at):
            return {"do": "start", "run": run, "name": name, "params": _plain(params), "tags": dict(tags), "at": at}
        case Points(run, points, at):
            return {"do": "points", "run": run, "points": [[p.step, _plain(p.metrics)] for p in points], "at": at}
        case Values(run, values, step, at):
            return {"do": "values", "run": run, "values": _plain(values), "step": step, "at": at}
        case Tag(run, tags):
            return {"do": "tag", "run": run, "tags": dict(tags)}
        case Artifact(run, path, folder):
            return {"do": "artifact", "run": run, "path": str(path), "folder": folder}
        case End(run, status, tags, at):
            return {"do": "end", "run": run, "status": status, "tags": dict(tags), "at": at}
        case _:
            assert_never(message)


def from_json(fields: dict[str, Any]) -> Message:
    """The message that `to_json` wrote."""
    kind = fields.pop("do")
    if kind == "points":
        points = [Point(step, {n: float(v) for n, v in metrics.items()}) for step, metrics in fields["points"]]
        return Points(fields["run"], points, fields["at"])
    if kind == "values":
        values = {name: float(value) for name, value in fields["values"].items()}
        return Values(fields["run"], values, fields["step"], fields["at"])
    if kind == "artifact":
        return Artifact(fields["run"], Path(fields["path"]), fields["folder"])
    return {"start": Start, "tag": Tag, "end": End}[kind](**fields)


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {n: str(v) if isinstance(v, float) and not math.isfinite(v) else v for n, v in values.items()}
