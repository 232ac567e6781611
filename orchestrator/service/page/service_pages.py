"""`ServicePages`: all pages of a service, and the page that compares sweeps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qs

from fastapi import APIRouter, FastAPI, Request, Response
from markupsafe import Markup

from dashboards.analysis.comparison import compare_sweeps
from dashboards.report.comparison_page import comparison_panels
from dashboards.report.figures import as_script
from orchestrator.folders import existing_sweep
from orchestrator.report_data import load_sweep_frame
from orchestrator.service.access_tokens import FailedLogins, LoginSessions, Role
from orchestrator.service.page.api_calls import ApiCalls
from orchestrator.service.page.list_page import list_pages
from orchestrator.service.page.listed_sweeps import Diagnoses, ListFilter, listed_sweeps
from orchestrator.service.page.new_page import editor_routes, new_pages
from orchestrator.service.page.page_rendering import PageRoute, render, static_routes
from orchestrator.service.page.sweep_pages import live_routes, sweep_pages
from orchestrator.service.page.sweep_views import SweepViews, draw_panel
from orchestrator.service.request_guard import require
from orchestrator.service.service_context import ServiceContext
from orchestrator.study.study import Study

_MOST_COMPARED = 12


class ServicePages:
    """The pages of one runs folder's service."""

    def __init__(
        self,
        context: ServiceContext,
        api: ApiCalls,
        logins: LoginSessions,
        failed: FailedLogins,
        problem: Callable[[], str],
        *,
        secure: bool,
    ) -> None:
        """Read nothing yet.

        Args:
            context: the runs folder.
            api: the functions of the API, which the pages call.
            logins: of browsers.
            failed: failed logins, whose addresses wait.
            problem: returns what keeps sweeps from starting.
            secure: whether browsers send the cookie by HTTPS only.
        """
        views = SweepViews(context.root)
        self._diagnoses = Diagnoses(context.root)
        self._routers = (
            static_routes(),
            list_pages(context, self._diagnoses, logins, failed, problem, secure=secure),
            live_routes(context.root, views),
            sweep_pages(context, views, api),
            editor_routes(context, api),
            new_pages(context, api),
            _compare_pages(context, self._diagnoses),
        )

    def add_to(self, app: FastAPI) -> None:
        """Let an app answer with these pages."""
        app.state.notices = {}
        for routes in self._routers:
            app.include_router(routes)

    def close(self) -> None:
        """End the thread that diagnoses sweeps."""
        self._diagnoses.close()


def _compare_pages(context: ServiceContext, diagnoses: Diagnoses) -> APIRouter:
    root = context.root
    pages = APIRouter(route_class=PageRoute, include_in_schema=False)

    @pages.get("/compare")
    def compare(request: Request, q: str = "", state: str = "", owner: str = "", page: int = 0) -> Response:
        """Answer with the comparison of the sweeps in the query, or with their choice.

        `page`: of the filtered sweeps to choose from; with it those chosen so far are not compared yet.
        """
        require(request, Role.VIEWER)
        asked = list(dict.fromkeys(parse_qs(request.url.query, max_num_fields=200).get("name", [])))
        folders = [existing_sweep(root, name) for name in asked[:_MOST_COMPARED]]
        wanted = ListFilter(q, state, owner, page=page)
        others = [row for row in listed_sweeps(context, diagnoses) if row.has_begun and row.name not in asked]
        shown: dict[str, Any] = {
            "title": "Compare",
            "description": "",
            "wanted": wanted,
            "listed": wanted.apply(others),
            "chosen": asked,
            "problem": "",
            "panels": [],
            "figures": Markup("{}"),
        }
        if len(folders) < 2 or len(asked) > _MOST_COMPARED:
            shown["problem"] = f"Choose two to {_MOST_COMPARED} sweeps."
        elif unbegun := [folder.name for folder in folders if not Study.exists(folder)]:
            shown["problem"] = f"No trial has started yet: {', '.join(unbegun)}."
        elif not page:
            found = compare_sweeps([load_sweep_frame(folder) for folder in folders])
            compared, shown["description"] = comparison_panels(found)
            drawn = [draw_panel(panel) for panel in compared]
            figures = {key: figure for panel in drawn for key, figure in panel.figures.items()}
            shown |= {
                "title": " · ".join(asked),
                "panels": [(panel, Markup(panel.html)) for panel in drawn],
                "figures": Markup(as_script(figures)),
            }
        return render(request, "compare.html.j2", **shown)

    return pages
