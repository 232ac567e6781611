"""Routes under `/api/v1`: sweeps are listed, planned, submitted, watched, stopped and resumed."""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Query, Response
from pydantic import BaseModel, ConfigDict, Field

from orchestrator.commands.runs_folder.sweep_list import SweepRow
from orchestrator.folders import SweepFolder, disk_usage
from orchestrator.service.service_context import (
    HIGHEST_PRIORITY,
    MOST_SWEEPS_ON_A_PAGE,
    Key,
    ListEntry,
    Operator,
    ServiceContext,
    Viewer,
    as_json,
    queue_json,
)
from orchestrator.service.sweep_queue import QueueRefused, QueueState
from trainer.storage.atomic_files import digest_of

Text = Annotated[str, Query(max_length=64)]
_SORTS: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "name": lambda entry: entry["name"],
    "age": lambda entry: -entry["began"],
    "state": lambda entry: str(entry["state"]),
    "owner": lambda entry: entry["queue"]["owner"] if entry["queue"] else "",
    "priority": lambda entry: entry["queue"]["priority"] if entry["queue"] else 0,
    "finished": lambda entry: entry.get("finished", 0),
    "value": lambda entry: _value(entry),
}


class SweepText(BaseModel):
    """A sweep's file as text."""

    model_config = ConfigDict(extra="forbid")

    yaml: str = Field(description="The sweep file; file names in it are relative to the data folders.")
    overrides: list[str] = Field(default=[], max_length=200, description="Changes as PATH=VALUE, as of --set.")
    name: str | None = Field(default=None, description="Name of the sweep instead of the file's.")
    files: dict[str, str] = Field(
        default={}, max_length=100, description="Uploaded files by their names in the sweep file, each as SHA256/NAME."
    )


class Submission(SweepText):
    """A sweep to start when its turn comes."""

    priority: int = Field(default=0, ge=-HIGHEST_PRIORITY, le=HIGHEST_PRIORITY, description="Larger ones first.")


def sweep_routes(context: ServiceContext) -> APIRouter:
    """Return the routes of one runs folder and its queue."""
    root, queue = context.root, context.queue
    routes = APIRouter(prefix="/api/v1", tags=["sweeps"])
    disk = _DiskUsage(root)

    @routes.get("/sweeps", response_model=dict[str, Any])
    def list_sweeps(
        _: Viewer,
        after: Annotated[str, Query(max_length=64, description="The last sweep of the page before.")] = "",
        limit: Annotated[int, Query(ge=1, le=MOST_SWEEPS_ON_A_PAGE)] = 50,
        state: Annotated[list[str], Query(max_length=20, description="Of the sweep, or of the queue.")] = [],  # noqa: B006
        owner: Text = "",
        text: Annotated[str, Query(max_length=64, description="Part of the name.")] = "",
        sort: Annotated[str, Query(pattern=f"^-?({'|'.join(_SORTS)})$", description="With - the last first.")] = "name",
        with_disk: Annotated[bool, Query(description="Measure the folders of this page.")] = False,
    ) -> Response:
        """List the sweeps: those that have begun, those of the queue, those archived from here.

        `next`: `after` of the next page. `disk`: bytes of the folder; null where it was not measured since its change.
        """
        entries = [
            entry
            for entry in context.listed()
            if (not state or entry.values["state"] in state or (entry.values["queue"] or {}).get("state") in state)
            and owner in ("", (entry.values["queue"] or {}).get("owner"))
            and text.lower() in entry.values["name"].lower()
        ]
        key = _SORTS[sort.removeprefix("-")]
        entries.sort(key=lambda entry: key(entry.values), reverse=sort.startswith("-"))
        names = [entry.values["name"] for entry in entries]
        first = _first_after(names, after, sort)
        sweeps = b",".join(disk.added_to(entry, measure=with_disk) for entry in entries[first : first + limit])
        last = names[first + limit - 1] if first + limit < len(entries) else None
        end = json.dumps({"total": len(entries), "next": last}).encode()
        return Response(b'{"sweeps":[%b],%b' % (sweeps, end[1:]), media_type="application/json")

    @routes.get("/queue")
    def list_queue(_: Viewer) -> dict[str, Any]:
        """List the sweeps that run or wait, in the order in which they start."""
        found = queue.sweeps((QueueState.DRIVEN, QueueState.WAITING))
        return {"queue": [{"name": sweep.name} | (queue_json(sweep) or {}) for sweep in found]}

    @routes.post("/plan")
    def plan(person: Operator, body: SweepText) -> dict[str, Any]:
        """Return what a sweep would do, as `orchestrate plan --json`."""
        return as_json(context.submissions.plan(person, body.yaml, body.overrides, body.name, body.files))

    @routes.post("/sweeps", status_code=HTTPStatus.CREATED)
    def submit(person: Operator, response: Response, body: Submission, idempotency_key: Key = "") -> dict[str, Any]:
        """Add a sweep to the queue. A repeated Idempotency-Key returns the sweep that it added, with status 200."""
        loaded = context.submissions.load(person, body.yaml, body.overrides, body.name, body.files)
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
        return {"name": added.name, "queue": queue_json(added), "notices": as_json(loaded.notices)}

    @routes.get("/sweeps/{name}")
    def show(_: Viewer, name: str) -> dict[str, Any]:
        """Return a sweep as `orchestrate status --json`, with its place in the queue."""
        return context.status(name)

    return routes


class _DiskUsage:
    """The bytes of sweeps' folders, measured again after the sweep's files changed."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._known: dict[str, tuple[Any, int]] = {}

    def added_to(self, entry: ListEntry, *, measure: bool) -> bytes:
        """Return an entry's JSON with `disk`: null where it is unknown and not to be measured."""
        if "disk" in entry.values:
            return entry.text
        size = 0 if entry.row is None else self._of(entry.row, measure=measure)
        return b'%b,"disk":%b}' % (entry.text[:-1], b"null" if size is None else b"%d" % size)

    def _of(self, row: SweepRow, *, measure: bool) -> int | None:
        known = self._known.get(row.name)
        if known is not None and row.stamp is not None and known[0] == row.stamp:
            return known[1]
        if not measure:
            return None
        size = disk_usage(SweepFolder(self._root, row.name).path)
        self._known[row.name] = (row.stamp, size)
        return size


def _first_after(names: Sequence[str], after: str, sort: str) -> int:
    """Return the position of the first sweep of the page after this one. Raises QueueRefused if it is gone."""
    if not after:
        return 0
    if sort == "name":
        return bisect_right(names, after)
    if after not in names:
        raise QueueRefused(f"{after} is no longer in this list: begin again with its first page")
    return names.index(after) + 1


def _value(entry: Mapping[str, Any]) -> float:
    """Return the best value such that a larger one is better; sweeps without one are last."""
    best = entry.get("best")
    if best is None or not isinstance(best["value"], float | int):
        return -math.inf
    return best["value"] if entry["goal"]["direction"] == "maximize" else -best["value"]
