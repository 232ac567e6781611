"""Renders pages from templates; serves styles and scripts; answers errors of pages as pages.

No page has inline scripts or style attributes, so that the Content-Security-Policy of `RequestGuard` forbids both.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable, Coroutine, Mapping
from functools import cache
from http import HTTPStatus
from pathlib import Path
from typing import Any, cast
from urllib.parse import parse_qs, quote, urlencode

from fastapi import APIRouter, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, RedirectResponse
from fastapi.routing import APIRoute
from markupsafe import Markup
from starlette.concurrency import run_in_threadpool

from dashboards.formatting import format_brief, format_duration
from dashboards.report.figures import ON_DARK, as_script
from dashboards.report.html_page import TEMPLATES as REPORT_TEMPLATES
from dashboards.report.html_page import plotly_js, template_environment
from orchestrator.errors import OrchestrateError
from orchestrator.redaction import redact, secret_values
from orchestrator.service.access_tokens import Person, Role
from orchestrator.service.problem_details import error_status, explain
from trainer.results import TrialError

_FOLDER = Path(__file__).parent
_STATIC = _FOLDER / "static"
_FILES: Mapping[str, Path] = {
    "report.css": REPORT_TEMPLATES / "style.css",
    "charts.js": REPORT_TEMPLATES / "charts.js",
    "page.css": _STATIC / "page.css",
    "list.js": _STATIC / "list.js",
    "sweep.js": _STATIC / "sweep.js",
    "editor.js": _STATIC / "editor.js",
}
_PLOTLY = "plotly.js"
_KINDS = {".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8"}
_FOREVER = {"cache-control": "public, max-age=31536000, immutable"}
_STYLE_ID = re.compile(r'document\.getElementById\("([0-9a-f]{40,})"\)')
_MOST_NOTICES = 1000
"""Logins of which notices wait to be shown."""


@cache
def environment() -> Any:
    """Return the templates of the pages and of the report."""
    found = template_environment(_FOLDER / "templates", REPORT_TEMPLATES)
    cast("dict[str, Any]", found.globals).update(
        asset=asset, plotly_styles=plotly_styles, dark=Markup(as_script(ON_DARK))
    )
    found.filters |= {"brief": format_brief, "duration": format_duration, "path": _path_part}
    return found


def _path_part(text: object) -> str:
    return quote(str(text), safe="")


@cache
def asset(name: str) -> str:
    """Return the URL of a style or script, which changes with its content."""
    content = plotly_js()[0].encode() if name == _PLOTLY else _FILES[name].read_bytes()
    return f"/static/{name}?v={hashlib.sha256(content).hexdigest()[:12]}"


@cache
def plotly_styles() -> tuple[str, ...]:
    """Return the ids of style elements that plotly.js adds to a page unless there are elements of these ids."""
    return tuple(dict.fromkeys(_STYLE_ID.findall(plotly_js()[0])))


@cache
def _packed_plotly() -> bytes:
    return base64.b64decode(plotly_js()[1])


def static_routes() -> APIRouter:
    """Return the route of styles and scripts, which need no login."""
    routes = APIRouter(include_in_schema=False)

    @routes.get("/static/{name}")
    def static(request: Request, name: str) -> Response:
        if name == _PLOTLY:
            if "gzip" not in request.headers.get("accept-encoding", ""):
                return Response(plotly_js()[0], headers=_FOREVER, media_type=_KINDS[".js"])
            return Response(_packed_plotly(), headers=_FOREVER | {"content-encoding": "gzip"}, media_type=_KINDS[".js"])
        if name not in _FILES:
            raise HTTPException(HTTPStatus.NOT_FOUND, "there is no such file")
        return Response(_FILES[name].read_bytes(), headers=_FOREVER, media_type=_KINDS[Path(name).suffix])

    return routes


def render(
    request: Request, template: str, status: int = HTTPStatus.OK, *, with_notices: bool = True, **values: Any
) -> HTMLResponse:
    """Return a page; secrets of the environment are masked in it. `with_notices`: it shows the waiting ones."""
    person: Person | None = request.state.person
    text = (
        environment()
        .get_template(template)
        .render(
            person=person,
            may_operate=person is not None and person.role >= Role.OPERATOR,
            may_administer=person is not None and person.role >= Role.ADMIN,
            csrf=request.state.csrf,
            notices=_taken_notices(request) if with_notices else ([], None),
            here=str(request.url.path) + (f"?{request.url.query}" if request.url.query else ""),
            **values,
        )
    )
    return HTMLResponse(redact(text, secret_values()), status)


class PageRoute(APIRoute):
    """A route whose errors are pages; a request without a login is sent to the login page."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the handler with its errors answered."""
        answer = super().get_route_handler()

        async def handler(request: Request) -> Response:
            try:
                return await answer(request)
            except HTTPException as error:
                if error.status_code == HTTPStatus.UNAUTHORIZED:
                    return RedirectResponse(login_url(request), HTTPStatus.SEE_OTHER)
                return error_page(request, error.status_code, error.detail)
            except OrchestrateError as error:
                shown = await run_in_threadpool(explain, request, error)
                return error_page(request, error_status(shown), str(shown))
            except TrialError as error:
                return error_page(request, HTTPStatus.UNPROCESSABLE_ENTITY, str(error))
            except RequestValidationError as error:
                found = "; ".join(f"{each['loc'][-1]}: {each['msg']}" for each in error.errors())
                return error_page(request, HTTPStatus.UNPROCESSABLE_ENTITY, found)

        return handler


def error_page(request: Request, status: int, detail: str) -> HTMLResponse:
    """Return the page of an error."""
    is_there = status in (HTTPStatus.CONFLICT, HTTPStatus.FORBIDDEN)
    name = request.path_params.get("name", "") if is_there else ""
    return render(request, "error.html.j2", status, title=HTTPStatus(status).phrase, detail=detail, name=name)


def login_url(request: Request) -> str:
    """Return the URL of the login page, which leads back to the page of this request."""
    if request.method != "GET" or request.url.path == "/":
        return "/login"
    query = f"?{request.url.query}" if request.url.query else ""
    return "/login?" + urlencode({"next": request.url.path + query})


def own_path(text: str) -> str:
    """Return a path of this service as given, and "/" for what leads to another site."""
    return text if re.fullmatch(r"/(?![/\\])[^\\\x00-\x20]*", text) else "/"


async def form_of(request: Request) -> dict[str, list[str]]:
    """Return the fields of a form; whether the person's page sent it was checked by the guard."""
    return parse_qs((await request.body()).decode(errors="replace"), keep_blank_values=True, max_num_fields=1000)


def add_notices(request: Request, texts: list[str], undo: tuple[str, str] | None = None) -> None:
    """Keep notices for the next page of this login. `undo`: label and URL of what takes the action back."""
    waiting: dict[str, Any] = request.app.state.notices
    waiting[request.state.cookie] = (texts, undo)
    while len(waiting) > _MOST_NOTICES:
        del waiting[next(iter(waiting))]


def _taken_notices(request: Request) -> tuple[list[str], tuple[str, str] | None]:
    return request.app.state.notices.pop(request.state.cookie, ([], None)) if request.state.cookie else ([], None)
