"""Routes that stay open: server-sent events of all sweeps, of one, and of a log that is followed."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial
from typing import Annotated

from fastapi import APIRouter, Header, Query, Request
from fastapi.responses import StreamingResponse
from starlette.concurrency import run_in_threadpool

from orchestrator.service.event_sources import ListSource, LogSource, SweepSource
from orchestrator.service.service_context import ServiceContext, Viewer
from orchestrator.service.sweep_watchers import Source

LastId = Annotated[str, Header(alias="Last-Event-ID", max_length=64)]
_HEADERS = {"x-accel-buffering": "no"}  # a proxy passes each message on at once


def event_routes(context: ServiceContext) -> APIRouter:
    """Return the routes."""
    routes = APIRouter(prefix="/api/v1", tags=["events"])

    async def stream(request: Request, key: Hashable, source: Callable[[], Source], last_id: str) -> StreamingResponse:
        watcher = await run_in_threadpool(context.watchers.watch, key, source)
        events = context.watchers.stream(watcher, last_id, request.state.is_still_valid)
        return StreamingResponse(events, media_type="text/event-stream", headers=_HEADERS)

    @routes.get("/events", response_class=StreamingResponse)
    async def all_events(request: Request, _: Viewer, last_event_id: LastId = "") -> StreamingResponse:
        """Send `sweeps` with the entries of the list that changed, until the client leaves."""
        return await stream(request, "list", partial(ListSource, context), last_event_id)

    @routes.get("/sweeps/{name}/events", response_class=StreamingResponse)
    async def sweep_events(request: Request, _: Viewer, name: str, last_event_id: LastId = "") -> StreamingResponse:
        """Send what changes in a sweep: `state`, `queue`, `history`, `trials`, `metrics`, and `gone` at its deletion.

        The first message is `reload`, with the state and the last update of each trial: read the sweep after it.
        Reconnected with Last-Event-ID, the stream continues after that message; where that is too long ago, it begins
        with `reload` again.
        """
        return await stream(request, ("sweep", name), partial(SweepSource, context, name), last_event_id)

    @routes.get("/sweeps/{name}/log/events", response_class=StreamingResponse)
    async def log_events(
        request: Request,
        _: Viewer,
        name: str,
        trial: Annotated[int | None, Query(ge=0)] = None,
        last_event_id: LastId = "",
    ) -> StreamingResponse:
        """Follow a log: `reload` with the last lines, then `lines` as they come, `end` once nothing more will come."""
        source = partial(LogSource, context, name, trial)
        return await stream(request, ("log", name, trial), source, last_event_id)

    return routes
