"""The first page: all sweeps with what is wrong with each, the queue, and who has the GPUs; login and logout."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Annotated, Any
from urllib.parse import parse_qsl, urlencode

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import RedirectResponse

from orchestrator.gpu_locks import gpu_holders
from orchestrator.gpus import visible_devices
from orchestrator.service.access_tokens import SESSION_SECONDS, FailedLogins, LoginSessions, Role
from orchestrator.service.page.listed_sweeps import SORTS, Diagnoses, ListFilter, listed_sweeps
from orchestrator.service.page.page_rendering import PageRoute, form_of, own_path, render
from orchestrator.service.request_guard import COOKIE, require
from orchestrator.service.service_context import ServiceContext
from orchestrator.service.sweep_queue import QueueState


def list_pages(
    context: ServiceContext,
    diagnoses: Diagnoses,
    logins: LoginSessions,
    failed: FailedLogins,
    problem: Callable[[], str],
    *,
    secure: bool,
) -> APIRouter:
    """Return the list of sweeps and the login.

    `problem`: returns what keeps sweeps from starting; `secure`: whether browsers send the cookie by HTTPS only.
    """
    pages = APIRouter(route_class=PageRoute, include_in_schema=False)

    def listed(request: Request, q: str, state: str, owner: str, sort: str, page: int) -> dict[str, Any]:
        """Return what the template of the list shows for these filters."""

        def query(**changed: Any) -> str:
            return _changed_query(request, changed)

        wanted = ListFilter(q, state, owner, sort if sort in SORTS else "newest", page)
        waiting = [each for state in (QueueState.DRIVEN, QueueState.WAITING) for each in context.queue.sweeps((state,))]
        return {
            "listed": wanted.apply(listed_sweeps(context, diagnoses)),
            "wanted": wanted,
            "query": query,
            "waiting": waiting,
            "gpus": _gpus(),
            "runs_folder": str(context.root),
            "keeps_from_starting": problem(),
        }

    @pages.get("/")
    def sweeps(
        request: Request, q: str = "", state: str = "", owner: str = "", sort: str = "newest", page: int = 1
    ) -> Response:
        """Answer with the list of sweeps, the queue and the GPUs."""
        require(request, Role.VIEWER)
        return render(request, "sweeps.html.j2", **listed(request, q, state, owner, sort, page))

    @pages.get("/list")
    def tables(
        request: Request, q: str = "", state: str = "", owner: str = "", sort: str = "newest", page: int = 1
    ) -> Response:
        """Answer with the tables of the page of the same query, for its script; notices stay for the next page."""
        require(request, Role.VIEWER)
        found = listed(request, q, state, owner, sort, page)
        return render(request, "list_tables.html.j2", with_notices=False, **found)

    @pages.get("/login")
    def ask(request: Request, to: Annotated[str, Query(alias="next")] = "/") -> Response:
        if request.state.person is not None:
            return RedirectResponse(own_path(to), HTTPStatus.SEE_OTHER)
        return render(request, "login.html.j2", problem="", next=own_path(to))

    @pages.post("/login")
    async def log_in(request: Request) -> Response:
        """Log in by the token of the form; failures are slowed."""
        form = await form_of(request)
        token, to = form.get("token", [""])[0].strip(), own_path(form.get("next", ["/"])[0])
        address = request.client.host if request.client else ""
        if wait := failed.wait_seconds(address):
            refused = f"Too many failed logins from this address: try again in {int(wait) + 1} seconds."
            return render(request, "login.html.j2", HTTPStatus.TOO_MANY_REQUESTS, problem=refused, next=to)
        begun = logins.log_in(token[:256])
        if begun is None:
            failed.add(address)
            refused = "This token is not valid, or was revoked."
            return render(request, "login.html.j2", HTTPStatus.UNAUTHORIZED, problem=refused, next=to)
        answer = RedirectResponse(to, HTTPStatus.SEE_OTHER)
        answer.set_cookie(COOKIE, begun[0], int(SESSION_SECONDS), httponly=True, samesite="strict", secure=secure)
        return answer

    @pages.post("/logout")
    def log_out(request: Request) -> Response:
        """End this browser's login."""
        logins.log_out(request.state.cookie)
        answer = RedirectResponse("/login", HTTPStatus.SEE_OTHER)
        answer.delete_cookie(COOKIE)
        return answer

    return pages


def _changed_query(request: Request, changed: Mapping[str, Any]) -> str:
    values = dict(parse_qsl(request.url.query)) | {key: str(value) for key, value in changed.items()}
    return "?" + urlencode({key: value for key, value in values.items() if value})


def _gpus() -> list[tuple[str, str]]:
    """Return each GPU of this machine, and who has it."""
    devices = visible_devices()
    holders = gpu_holders(devices)
    names = [", ".join(part for part in (device.name, device.memory_text) if part) for device in devices]
    return [
        (f"{device.index} {name}".strip(), str(holders[device]) if device in holders else "free")
        for device, name in zip(devices, names, strict=True)
    ]
