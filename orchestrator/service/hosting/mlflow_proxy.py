"""MLflow behind the service's login: its pages below `/mlflow/`, to read; who may do what there, and what it may do.

MLflow knows no people, so that what each may ask of it is decided here, by a list: everything else is refused. Its
pages have the service's origin, in which a script could use the login of the person who looks. Their
Content-Security-Policy lets them reach MLflow's own paths only; another Cross-Origin-Opener-Policy than that of the
service's pages separates windows that one opens from the other.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Mapping
from http import HTTPStatus
from pathlib import Path
from urllib.parse import urlencode

from fastapi import APIRouter, HTTPException, Request, Response
from fastapi.responses import RedirectResponse, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.types import Receive, Scope, Send

from orchestrator.errors import StorageRefused
from orchestrator.folders import RUNS_FILE, SweepFolder, existing_sweep
from orchestrator.service.access_tokens import Role
from orchestrator.service.hosting.mlflow_server import (
    MLFLOW_PATH,
    MlflowAnswer,
    MlflowBusy,
    MlflowServer,
    MlflowStarting,
)
from orchestrator.service.page.page_rendering import PageRoute, render
from orchestrator.service.problem_details import problem
from orchestrator.service.request_guard import require
from orchestrator.study.study import Study
from orchestrator.tracking.run_metadata import charts_page, run_page

LARGEST_ANSWER = 256 << 20
"""Bytes."""
_PATH = re.compile(r"(?:[\w~:@+-][\w.~:@+-]*(?:/|$))*", re.ASCII)
"""Paths that are passed on: no segment begins with a dot, none is empty."""
_HOST = re.compile(r"[\w.-]+(:\d+)?", re.ASCII)
_API = r"(?:ajax-)?api/[234]\.0/mlflow/"
_GRAPHQL = "graphql"
_PAGE = ""
_FILES = "static-files/"
_READ = re.compile(
    rf"{_FILES}.+|health|version|get-artifact|model-versions/get-artifact|{_API}(?:artifacts/list"
    r"|(?:datasets|experiments|issues|label-schemas|logged-models|metrics|model-versions|registered-models|review-queues"
    r"|runs|scorers|traces|workspaces)(?:/.*)?|get-trace-artifact|server-info|ui-telemetry|users/current)"
)
"""What GET may read. Gateway, webhooks, jobs and the assistant are not in it: they reach other servers or run code."""
_SEARCH = re.compile(
    rf"{_API}(?:datasets/search|experiments/search|experiments/search-datasets|issues/search|logged-models/search"
    r"|registered-models/get-latest-versions|runs/search|traces/search|traces/metrics|traces/batchGetInfos"
    r"|traces/calculate-filter-correlation)"
)
"""What MLflow 3.17 reads by POST."""
_EDIT = re.compile(
    rf"{_API}(?:experiments/(?:update|delete|restore|set-experiment-tag|delete-experiment-tag)"
    r"|runs/(?:update|delete|restore|set-tag|delete-tag))"
)
"""What operators may change where that is allowed. Nothing that creates: a new experiment may name any folder of this
machine as the place of its artifacts, which MLflow then reads."""
_WRITING_GRAPHQL = re.compile(r"\b(mutation|subscription)\b")
_TO_MLFLOW = ("accept", "accept-encoding", "content-type", "if-modified-since", "if-none-match", "range")
_TO_PERSON = (
    "accept-ranges", "content-disposition", "content-encoding", "content-length", "content-range", "content-type",
    "etag", "last-modified",
)  # fmt: skip
"""Headers that are passed on; cookies and tokens are in neither list."""
_NO_SCRIPTS = "default-src 'none'; sandbox; frame-ancestors 'none'"
_STARTING_SECONDS = 2


def mlflow_routes(server: MlflowServer) -> APIRouter:
    """Return the routes below MLFLOW_PATH."""
    routes = APIRouter(include_in_schema=False)
    pages = APIRouter(route_class=PageRoute, include_in_schema=False)

    @pages.get(MLFLOW_PATH)
    def without_slash() -> Response:
        return RedirectResponse(f"{MLFLOW_PATH}/")

    @pages.get(f"{MLFLOW_PATH}/")
    async def page(request: Request) -> Response:
        """Answer with MLflow's page, whose script shows all others."""
        require(request, Role.VIEWER)
        if server.options.url:
            return RedirectResponse(server.options.url)
        try:
            return await _answer(server, request, _PAGE)
        except MlflowStarting:
            return starting(request)

    @routes.api_route(f"{MLFLOW_PATH}/{{path:path}}", methods=["GET", "POST", "PATCH", "PUT", "DELETE"])
    async def pass_on(request: Request, path: str) -> Response:
        """Answer with what MLflow answers, where the person may ask it."""
        person = require(request, Role.VIEWER)
        body = check_right(request.method, path, person.role, await request.body(), edits=server.options.edits)
        try:
            return await _answer(server, request, path, body)
        except MlflowStarting:
            wait = {"retry-after": str(_STARTING_SECONDS)}
            return problem(HTTPStatus.SERVICE_UNAVAILABLE, "MLflow is starting; ask again in a moment", wait)

    pages.include_router(routes)
    return pages


def mlflow_links(server: MlflowServer, root: Path) -> APIRouter:
    """Return the routes that lead from a sweep or a trial to its page in MLflow. `root`: the runs folder."""
    pages = APIRouter(route_class=PageRoute, include_in_schema=False)

    @pages.get("/sweeps/{name}/mlflow")
    @pages.get("/sweeps/{name}/trials/{number}/mlflow")
    async def lead(request: Request, name: str, number: int | None = None) -> Response:
        """Lead to the charts of a sweep, or to the run of a trial; to all runs where MLflow does not have them yet."""
        require(request, Role.VIEWER)
        folder = existing_sweep(root, name)
        experiment, sweep = await run_in_threadpool(_stored, folder)
        try:
            found = await _experiment(server, experiment)
        except MlflowStarting:
            return starting(request)
        run = "" if number is None else await run_in_threadpool(_run_id, folder, number)
        page = "" if not found else charts_page(found, sweep) if not run else run_page(found, run)
        return RedirectResponse(f"{MLFLOW_PATH}/{f'#{page}' if page else ''}", HTTPStatus.SEE_OTHER)

    return pages


def check_right(method: str, path: str, role: Role, body: bytes, *, edits: bool) -> bytes:
    """Return the body that is passed on.

    Args:
        method: of the request.
        path: below MLFLOW_PATH.
        role: of the person.
        body: of the request.
        edits: whether operators may change runs.

    Raises:
        HTTPException: the request is not in the lists of what may be passed on.
    """
    if not _PATH.fullmatch(path):
        raise HTTPException(HTTPStatus.NOT_FOUND, "MLflow has no such path here")
    if method == "GET" and _READ.fullmatch(path):
        return b""
    if method == "POST" and _SEARCH.fullmatch(path):
        return body
    if method == "POST" and path == _GRAPHQL:
        return _query_of(body)
    if method == "POST" and _EDIT.fullmatch(path):
        if edits and role >= Role.OPERATOR:
            return body
        allowed = (
            "this needs the role operator" if edits else "`orchestrate serve --mlflow-edits` opens this to operators"
        )
        raise HTTPException(HTTPStatus.FORBIDDEN, f"MLflow is shown to be read; {allowed}")
    raise HTTPException(
        HTTPStatus.FORBIDDEN, f"MLflow is shown to be read: the service does not pass on {method} {path}"
    )


def _query_of(body: bytes) -> bytes:
    """Return a GraphQL request that reads, written anew, so that MLflow reads it as it was read here."""
    try:
        given = json.loads(body)
        query = given["query"]
        is_read = isinstance(query, str) and not _WRITING_GRAPHQL.search(query)
    except (ValueError, TypeError, KeyError):
        raise HTTPException(HTTPStatus.UNPROCESSABLE_ENTITY, "this is no GraphQL request") from None
    if not is_read:
        raise HTTPException(HTTPStatus.FORBIDDEN, "MLflow is shown to be read: only queries of GraphQL are passed on")
    return json.dumps(given).encode()


async def _answer(server: MlflowServer, request: Request, path: str, body: bytes = b"") -> Response:
    given = {name: request.headers[name] for name in _TO_MLFLOW if name in request.headers}
    protection = _protection(request, path)
    try:
        answer = await server.send(request.method, path, request.url.query, body, given)
    except MlflowBusy:
        wait = {"retry-after": "1"}
        return problem(HTTPStatus.SERVICE_UNAVAILABLE, "MLflow has too many requests at once; ask again", wait)
    response = answer.response
    size = response.headers.get("content-length", "0")
    is_too_large = size.isdecimal() and int(size) > LARGEST_ANSWER
    if is_too_large or response.has_redirect_location:
        await answer.aclose()
        detail = f"more than {LARGEST_ANSWER >> 20} MiB" if is_too_large else "a redirection"
        return problem(HTTPStatus.BAD_GATEWAY, f"MLflow answers with {detail}, which the service does not pass on")
    headers = {name: response.headers[name] for name in _TO_PERSON if name in response.headers}
    if path.startswith(_FILES) and response.is_success:
        headers["cache-control"] = "private, max-age=86400"
    return _PassedOn(answer, headers | protection)


class _PassedOn(StreamingResponse):
    """An answer of MLflow, which is closed at its end and when the person goes away."""

    def __init__(self, answer: MlflowAnswer, headers: Mapping[str, str]) -> None:
        super().__init__(_bounded(answer), answer.response.status_code, headers)
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._answer.aclose()


async def _bounded(answer: MlflowAnswer) -> AsyncIterator[bytes]:
    left = LARGEST_ANSWER
    async for chunk in answer:
        left -= len(chunk)
        if left < 0:  # its length was not announced; the person's connection ends without the end of the body
            raise StorageRefused(f"MLflow's answer has more than {LARGEST_ANSWER >> 20} MiB")
        yield chunk


def _protection(request: Request, path: str) -> dict[str, str]:
    """Return the headers that restrict what a browser does with an answer of MLflow."""
    if path == _PAGE:
        return {"content-security-policy": page_policy(request), "cross-origin-opener-policy": "unsafe-none"}
    return {"content-security-policy": _NO_SCRIPTS}


def page_policy(request: Request) -> str:
    """Return the Content-Security-Policy of MLflow's page: it reaches MLflow's own paths, and nothing else here.

    `unsafe-eval` is for its parallel coordinates, which plotly draws by compiled functions.
    """
    host = request.headers.get("host", "")
    if not _HOST.fullmatch(host):  # an IPv6 address, which a policy cannot have
        raise HTTPException(HTTPStatus.BAD_REQUEST, "MLflow is shown under a name or an IPv4 address of this service")
    own = f"{request.url.scheme}://{host}{MLFLOW_PATH}/"
    files = f"{own}{_FILES}"
    sources = {
        "default-src": "'none'",
        "script-src": f"{files} 'unsafe-eval'",
        "style-src": f"{files} 'unsafe-inline'",
        "font-src": f"{files} data:",
        "img-src": f"{own} data: blob:",
        "media-src": f"{own} blob:",
        "connect-src": f"{own} data: blob:",
        "worker-src": f"{files} blob:",
        "manifest-src": files,
        "frame-src": "blob:",
        "form-action": "'none'",
        "base-uri": "'none'",
        "frame-ancestors": "'none'",
    }
    return "; ".join(f"{name} {value}" for name, value in sources.items())


def starting(request: Request) -> Response:
    """Return the page that waits for MLflow and then leads to what was asked for."""
    return render(request, "starting.html.j2", HTTPStatus.ACCEPTED, seconds=_STARTING_SECONDS)


async def _experiment(server: MlflowServer, name: str) -> str:
    """Return the id of an experiment; "" where MLflow has none of this name."""
    query = urlencode({"experiment_name": name})
    answer = await server.send("GET", "api/2.0/mlflow/experiments/get-by-name", query)
    text = await answer.text()
    return str(json.loads(text)["experiment"]["experiment_id"]) if answer.response.is_success else ""


def _stored(folder: SweepFolder) -> tuple[str, str]:
    """Return a sweep's experiment and id. Raises StudyMissing."""
    with Study.open(folder, read_only=True) as study:
        return study.spec.tracking.experiment, study.id


def _run_id(folder: SweepFolder, number: int) -> str:
    path = folder.path / RUNS_FILE
    return json.loads(path.read_text(encoding="utf-8")).get(str(number), "") if path.is_file() else ""
