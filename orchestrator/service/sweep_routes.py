"""Routes under `/api/v1`: sweeps are listed, planned, submitted, watched, stopped and resumed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from http import HTTPStatus
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from orchestrator.commands.request_commands import request_control
from orchestrator.commands.status import history, status
from orchestrator.folders import SweepFolder, known_sweeps
from orchestrator.redaction import redact_all, secret_values
from orchestrator.service.access_tokens import Person, Role
from orchestrator.service.request_guard import require
from orchestrator.service.submissions import Submissions
from orchestrator.service.sweep_queue import NotQueued, QueuedSweep, QueueState, SweepQueue
from trainer.storage.atomic_files import digest_of

_MOST_ON_A_PAGE = 200
_HIGHEST_PRIORITY = 1000

Limit = Annotated[int, Query(ge=1, le=_MOST_ON_A_PAGE)]
Name = Annotated[str, Query(max_length=64)]


class SweepText(BaseModel):
    """A sweep's file as text."""

    model_config = ConfigDict(extra="forbid")

    yaml: str = Field(description="The sweep file; file names in it are relative to the data folders.")
    overrides: list[str] = Field(default=[], max_length=200, description="Changes as PATH=VALUE, as of --set.")
    name: str | None = Field(default=None, description="Name of the sweep instead of the file's.")


class Submission(SweepText):
    """A sweep to start when its turn comes."""

    priority: int = Field(default=0, ge=-_HIGHEST_PRIORITY, le=_HIGHEST_PRIORITY, description="Larger ones first.")


class Reason(BaseModel):
    """Why a person does something, stored in the sweep's history."""

    model_config = ConfigDict(extra="forbid")

    why: str = Field(default="", max_length=500)


class Priority(BaseModel):
    """A waiting sweep's new place."""

    model_config = ConfigDict(extra="forbid")

    priority: int = Field(ge=-_HIGHEST_PRIORITY, le=_HIGHEST_PRIORITY)


def sweep_routes(root: Path, queue: SweepQueue, submissions: Submissions) -> APIRouter:
    """Return the routes of one runs folder, its queue and what people submit to it."""
    routes = APIRouter(prefix="/api/v1", tags=["sweeps"])

    @routes.get("/sweeps")
    def list_sweeps(request: Request, after: Name = "", limit: Limit = 50) -> dict[str, Any]:
        """List the sweeps by name: those that have begun and those of the queue. `next`: `after` of the next page."""
        require(request, Role.VIEWER)
        queued = {sweep.name: sweep for sweep in queue.sweeps()}
        names = sorted(name for name in {*known_sweeps(root), *queued} if name > after)
        shown = names[:limit]
        return {
            "sweeps": [{"name": name, "queue": _queue_json(queued.get(name))} for name in shown],
            "next": shown[-1] if len(names) > limit else None,
        }

    @routes.get("/queue")
    def list_queue(request: Request) -> dict[str, Any]:
        """List the sweeps that run or wait, in the order in which they start."""
        require(request, Role.VIEWER)
        found = queue.sweeps((QueueState.DRIVEN, QueueState.WAITING))
        return {"queue": [{"name": sweep.name} | (_queue_json(sweep) or {}) for sweep in found]}

    @routes.post("/plan")
    def plan(request: Request, body: SweepText) -> dict[str, Any]:
        """Return what a sweep would do, as `orchestrate plan --json`."""
        person = require(request, Role.OPERATOR)
        return _as_json(submissions.plan(person, body.yaml, body.overrides, body.name))

    @routes.post("/sweeps", status_code=HTTPStatus.CREATED)
    def submit(
        request: Request,
        response: Response,
        body: Submission,
        idempotency_key: Annotated[str, Header(max_length=128)] = "",
    ) -> dict[str, Any]:
        """Add a sweep to the queue. A repeated Idempotency-Key returns the sweep that it added, with status 200."""
        person = require(request, Role.OPERATOR)
        loaded = submissions.load(person, body.yaml, body.overrides, body.name)
        added, is_new = queue.submit(
            loaded.name,
            loaded.spec,
            SweepFolder(root, loaded.name).path,
            owner=person.name,
            priority=body.priority,
            gpus=loaded.gpus,
            key=idempotency_key,
            digest=digest_of(body.model_dump()),
        )
        response.status_code = HTTPStatus.CREATED if is_new else HTTPStatus.OK
        return {"name": added.name, "queue": _queue_json(added), "notices": _as_json(loaded.notices)}

    @routes.get("/sweeps/{name}")
    def show(request: Request, name: str) -> dict[str, Any]:
        """Return a sweep as `orchestrate status --json`, with its place in the queue."""
        require(request, Role.VIEWER)
        return _status(root, queue, name)

    @routes.get("/sweeps/{name}/trials")
    def trials(
        request: Request, name: str, after: Annotated[int, Query(ge=-1)] = -1, limit: Limit = 50
    ) -> dict[str, Any]:
        """Return a page of a sweep's trials by number. `next`: `after` of the next page."""
        require(request, Role.VIEWER)
        found = [trial for trial in _status(root, queue, name)["trials"] if trial["number"] > after]
        shown = found[:limit]
        return {"trials": shown, "next": shown[-1]["number"] if len(found) > limit else None}

    @routes.get("/sweeps/{name}/history")
    def events(request: Request, name: str) -> dict[str, Any]:
        """Return a sweep's events and changes, as `orchestrate history --json`, and what people did in the `queue`."""
        require(request, Role.VIEWER)
        actions = [asdict(action) for action in queue.actions(name)]
        if actions and name not in known_sweeps(root):  # it waits, or has not begun before it was withdrawn
            return {"queue": _as_json(actions)}
        return _as_json(history(name, root)) | {"queue": _as_json(actions)}

    @routes.post("/sweeps/{name}/stop")
    def stop(request: Request, name: str, body: Reason) -> dict[str, Any]:
        """Stop a running sweep with checkpoints, or take a waiting one out of the queue."""
        person = require(request, Role.OPERATOR)
        if (sweep := _queued(queue, name)) is not None and sweep.state is QueueState.WAITING:
            queue.withdraw(name, _reason(person, body, "withdrawn"))
            return {"notices": [f"{name} waits no longer"]}
        return {"notices": request_control(name, root, "stop", None, body.why)}

    @routes.post("/sweeps/{name}/pause")
    def pause(request: Request, name: str, body: Reason) -> dict[str, Any]:
        """Pause a running sweep."""
        require(request, Role.OPERATOR)
        return {"notices": request_control(name, root, "pause", None, body.why)}

    @routes.post("/sweeps/{name}/unpause")
    def unpause(request: Request, name: str, body: Reason) -> dict[str, Any]:
        """Continue a paused sweep."""
        require(request, Role.OPERATOR)
        return {"notices": request_control(name, root, "unpause", None, body.why)}

    @routes.post("/sweeps/{name}/resume")
    def resume(request: Request, name: str) -> dict[str, Any]:
        """Let a sweep of the queue that has ended wait again."""
        require(request, Role.OPERATOR)
        return {"name": name, "queue": _queue_json(queue.resume(name))}

    @routes.post("/sweeps/{name}/priority")
    def set_priority(request: Request, name: str, body: Priority) -> dict[str, Any]:
        """Change the place of a waiting sweep."""
        require(request, Role.OPERATOR)
        return {"name": name, "queue": _queue_json(queue.set_priority(name, body.priority))}

    return routes


def _status(root: Path, queue: SweepQueue, name: str) -> dict[str, Any]:
    sweep = _queued(queue, name)
    if sweep is not None and name not in known_sweeps(root):
        found: dict[str, Any] = {"name": name, "state": sweep.state.value, "why": sweep.why, "trials": []}
    else:
        found = status(name, root)
    return _as_json(found) | {"queue": _queue_json(sweep)}


def _queued(queue: SweepQueue, name: str) -> QueuedSweep | None:
    try:
        return queue.find(name)
    except NotQueued:
        return None


def _queue_json(sweep: QueuedSweep | None) -> dict[str, Any] | None:
    """Return a sweep's place in the queue; None for one that was started by a command."""
    if sweep is None:
        return None
    names = ("owner", "priority", "gpus", "deaths", "submitted_at", "started_at", "ended_at")
    return {"state": sweep.state.value, "why": sweep.why} | {name: getattr(sweep, name) for name in names}


def _reason(person: Person, body: Reason, done: str) -> str:
    return f"{body.why or done} (by {person.name} through the service)"


def _as_json(value: Any) -> Any:
    """Mask secrets; NaN and infinities, which JSON lacks, become null."""
    return _finite(redact_all(value, secret_values()))


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
