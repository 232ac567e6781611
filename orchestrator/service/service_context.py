"""`ServiceContext`: what the routes share, and how they answer: JSON without secrets, pages, each request once."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, Header, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from orchestrator.commands.request_commands import acting_for
from orchestrator.commands.runs_folder.archive_records import find_record
from orchestrator.commands.runs_folder.sweep_list import (
    ARCHIVED,
    SweepRow,
    SweepSummaries,
    archived_entries,
    archived_text,
)
from orchestrator.commands.runs_folder.sweep_logs import SweepLog
from orchestrator.commands.status import status
from orchestrator.errors import NoSuchSweep, OrchestrateError, closest_match
from orchestrator.folders import SweepFolder, existing_sweep, known_sweeps
from orchestrator.redaction import redact_all, secret_values
from orchestrator.service.access_tokens import Person, Role
from orchestrator.service.hosting.mlflow_server import MlflowServer
from orchestrator.service.judge_processes import judging
from orchestrator.service.request_guard import require
from orchestrator.service.service_measures import Measures
from orchestrator.service.submissions import Submissions
from orchestrator.service.sweep_queue import NotBegun, NotQueued, QueuedSweep, QueueRefused, SweepQueue
from orchestrator.service.sweep_watchers import Watchers
from orchestrator.spec.loading.loader import load_spec_text
from orchestrator.spec.sweep_spec import SweepSpec
from trainer.results import TrialError
from trainer.storage.atomic_files import digest_of

MOST_ON_A_PAGE, MOST_SWEEPS_ON_A_PAGE = 200, 5000
HIGHEST_PRIORITY = 1000

Limit = Annotated[int, Query(ge=1, le=MOST_ON_A_PAGE)]
Name = Annotated[str, Query(max_length=64)]
Key = Annotated[str, Header(alias="Idempotency-Key", max_length=128)]


async def _viewer(request: Request) -> Person:
    return require(request, Role.VIEWER)


async def _operator(request: Request) -> Person:
    return require(request, Role.OPERATOR)


async def _admin(request: Request) -> Person:
    return require(request, Role.ADMIN)


Viewer = Annotated[Person, Depends(_viewer)]
Operator = Annotated[Person, Depends(_operator)]
Admin = Annotated[Person, Depends(_admin)]
"""Who makes a request, with at least this role."""


class Reason(BaseModel):
    """Why a person does something, stored in the sweep's history."""

    model_config = ConfigDict(extra="forbid")

    why: str = Field(default="", max_length=500)


class Settings(Reason):
    """Settings of one trial."""

    overrides: list[str] = Field(default=[], max_length=200, description="Settings as PATH=VALUE, as of --set.")


@dataclass(frozen=True, slots=True)
class ServiceContext:
    """One runs folder as the service has it open."""

    root: Path
    queue: SweepQueue
    entries: ListEntries
    submissions: Submissions
    mlflow: MlflowServer
    watchers: Watchers = field(default_factory=Watchers)
    measures: Measures = field(default_factory=Measures)

    def queued(self, name: str) -> QueuedSweep | None:
        """Return the sweep's row in the queue; None for one that was begun by a command."""
        try:
            return self.queue.find(name)
        except NotQueued:
            return None

    def explained(self, error: OrchestrateError) -> OrchestrateError:
        """Return what a person is to read of a sweep without a folder: that it is archived, or has not begun.

        Of one that there is not, the names from which to choose include those of the queue.
        """
        if not isinstance(error, NoSuchSweep):
            return error
        if (archived := find_record(self.root, error.name)) is not None:
            return QueueRefused(f"{error.name} is archived {archived_text(archived)}")
        queued = self.queued(error.name)
        if queued is not None:
            return NotBegun(queued)
        known = sorted({*error.known, *self.queue.overview()})
        return NoSuchSweep(error.name, error.root, known, closest_match(error.name, known))

    def is_unbegun(self, name: str) -> bool:
        """Return whether the queue has a sweep that has no folder, here or in an archive."""
        has_files = name in known_sweeps(self.root) or find_record(self.root, name) is not None
        return not has_files and self.queued(name) is not None

    def log(self, name: str, trial: int | None = None, attempt: int | None = None, *, most: int) -> SweepLog:
        """Open a log as `SweepLog.open`; of a sweep that has not begun, the output of its driver."""
        if trial is None and name not in known_sweeps(self.root) and self.queued(name) is not None:
            return SweepLog(SweepFolder(self.root, name), most=most)
        return SweepLog.open(name, self.root, trial, attempt, most=most)

    def spec(self, name: str) -> SweepSpec:
        """Return a sweep as its file has it, begun or not. Raises NoSuchSweep, SpecError."""
        sweep, folder = self.queued(name), SweepFolder(self.root, name)
        if sweep is not None and sweep.spec and not folder.spec.is_file():
            return load_spec_text(sweep.spec, folder.path, is_new=False)
        folder = existing_sweep(self.root, name)
        return load_spec_text(folder.spec.read_text(encoding="utf-8"), folder.path, is_new=False)

    def judging(self, name: str) -> dict[str, Any] | None:
        """Return the judge that this service started where it runs or has failed: `state`, `since`, and `why`."""
        found = judging(SweepFolder(self.root, name))
        return None if found is None else as_json(found.as_json())

    def status(self, name: str) -> dict[str, Any]:
        """Return a sweep as `status --json`, with its row of the queue and `judging` beside it. Raises NoSuchSweep."""
        sweep, found = self.queued(name), dict[str, Any]()
        is_here, archived = name in known_sweeps(self.root), find_record(self.root, name)
        if not is_here and archived is not None and (sweep is None or sweep.state.has_ended):
            found = {"name": name, "state": ARCHIVED, "why": archived_text(archived), "trials": []}
        elif not is_here and sweep is not None:
            found = {"name": name, "state": sweep.state.value, "why": sweep.why, "trials": []}
        else:
            found = status(name, self.root)
        return as_json(found) | {"queue": queue_json(sweep), "judging": self.judging(name)}

    def listed(self) -> list[ListEntry]:
        """Return an entry for each sweep that has begun, waits or was archived, by name."""
        return self.entries.read(self.queue.overview())

    def once(
        self, person: Person, key: str, name: str, request: Any, answer: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        """Return the answer to a request; with an idempotency key that was used for it, the answer of then.

        Args:
            person: who makes it.
            key: its Idempotency-Key; "" for none.
            name: the sweep that it is about.
            request: what tells it from other requests, as JSON.
            answer: carries it out.

        Raises:
            KeyUsed, NotAnswered: the key belongs to another request, or to one without an answer.
        """
        with acting_for(person.name):
            if not key:
                return answer()
            before = self.queue.begin_request(person.name, key, digest_of([name, request]), name)
            if before is not None:
                return json.loads(before)
            try:
                found = answer()
            except (OrchestrateError, TrialError):  # nothing was changed
                self.queue.store_answer(person.name, key, None)
                raise
            self.queue.store_answer(person.name, key, json.dumps(found))
            return found

    def control(
        self, person: Person, name: str, change: Callable[[], Sequence[str]], key: str = "", request: Any = None
    ) -> dict[str, Any]:
        """Return the notices of a change that this person makes; with a key, made once."""

        def answer() -> dict[str, Any]:
            return {"name": name, "notices": as_json(list(change()))}

        return self.once(person, key, name, request, answer)


@dataclass(frozen=True, slots=True, eq=False)
class ListEntry:
    """A sweep in the list, as JSON without secrets: its summary and, as `queue`, its place in the queue."""

    values: dict[str, Any]
    text: bytes
    """`values` as JSON."""
    row: SweepRow | None
    """Of a sweep that has begun here."""


class ListEntries:
    """The entries of a runs folder's list; each is made again only after its sweep has changed. Thread-safe."""

    def __init__(self, root: Path) -> None:
        self._root, self._summaries = root, SweepSummaries(root)
        self._guard = threading.Lock()
        self._secrets: list[str] = []
        self._made: dict[str, tuple[Any, QueuedSweep | None, ListEntry]] = {}
        """By sweep: what its entry was made from, and the entry."""

    def read(self, queued: Mapping[str, QueuedSweep]) -> list[ListEntry]:
        """Return the entries by name; the same objects where nothing has changed.

        `queued`: the sweeps of the queue.
        """
        rows = {row.name: row for row in self._summaries.rows()}
        taken = {*rows, *(name for name, sweep in queued.items() if not sweep.state.has_ended)}
        archived = {entry["name"]: entry for entry in archived_entries(self._root, taken)}
        secrets = secret_values()
        with self._guard:
            before = self._made if secrets == self._secrets else {}
            self._secrets, self._made = secrets, {}
            for name in sorted({*rows, *archived, *queued}):
                row, place = rows.get(name), queued.get(name)
                source = row.summary if row is not None else archived.get(name)
                old = before.get(name)
                if old is None or old[:2] != (source, place):
                    entry = _entry(source, place, row)
                else:
                    entry = old[2] if old[2].row is row else replace(old[2], row=row)
                self._made[name] = (source, place, entry)
            return [entry for _, _, entry in self._made.values()]


def _entry(summary: Mapping[str, Any] | None, place: QueuedSweep | None, row: SweepRow | None) -> ListEntry:
    if summary is None:
        assert place is not None
        summary = _without_folder(place)
    values = as_json({**summary, "queue": queue_json(place)})
    text = json.dumps(values, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return ListEntry(values, text.encode(errors="replace"), row)


def _without_folder(sweep: QueuedSweep) -> dict[str, Any]:
    """Return the list's entry of a sweep without a folder."""
    return {
        "name": sweep.name,
        "state": sweep.state.value,
        "why": sweep.why,
        "finished": 0,
        "planned": None,
        "states": {},
        "goal": None,
        "best": None,
        "began": sweep.submitted_at,
    }


def queue_json(sweep: QueuedSweep | None) -> dict[str, Any] | None:
    """Return a sweep's place in the queue; None for one that was begun by a command."""
    if sweep is None:
        return None
    names = ("owner", "priority", "gpus", "deaths", "submitted_at", "started_at", "ended_at")
    return {"state": sweep.state.value, "why": sweep.why} | {name: getattr(sweep, name) for name in names}


def reason(person: Person, why: str, done: str) -> str:
    """Return why a person does something, with the person."""
    return f"{why or done} (by {person.name} through the service)"


def as_json(value: Any) -> Any:
    """Mask secrets; NaN and infinities, which JSON lacks, become null."""
    return _finite(redact_all(value, secret_values()))


def page_html(text: str, policy: str) -> Response:
    """Return a page with its own Content-Security-Policy in place of the service's."""
    return Response(text, media_type="text/html; charset=utf-8", headers={"content-security-policy": policy})


def _finite(value: Any) -> Any:
    match value:
        case float():
            return value if math.isfinite(value) else None
        case Mapping():
            return {key: _finite(inner) for key, inner in value.items()}
        case str():
            return value
        case Sequence():
            return [_finite(inner) for inner in value]
        case _:
            return value
