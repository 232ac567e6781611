"""The page of a new sweep: an editor with the loader's findings at their lines, and the plan beside it."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from http import HTTPStatus
from importlib.resources import files
from pathlib import Path
from typing import Any

from fastapi import APIRouter, HTTPException, Request, Response
from fastapi.responses import RedirectResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool

from dashboards.analysis.follow_up import next_name
from orchestrator.errors import OrchestrateError, SpecError
from orchestrator.folders import known_sweeps
from orchestrator.redaction import redact_all, secret_values
from orchestrator.report_data import suggest
from orchestrator.service.access_tokens import Person, Role
from orchestrator.service.page.api_calls import ApiCalls
from orchestrator.service.page.page_rendering import PageRoute, add_notices, environment, form_of, render
from orchestrator.service.page.yaml_completion import complete
from orchestrator.service.request_guard import require
from orchestrator.service.service_context import ServiceContext
from orchestrator.service.sweep_queue import QueueState
from orchestrator.spec.loading.serialization import dump_spec
from trainer.results import TrialError

_LARGEST = 200_000
"""Characters of a sweep file in the editor."""
_FIRST_EXAMPLE = "quickstart"


class Text(BaseModel):
    """The content of the editor."""

    model_config = ConfigDict(extra="forbid")

    yaml: str = Field(max_length=_LARGEST)


class Cursor(Text):
    """The content of the editor and the place of the cursor, both counted from 0."""

    line: int = Field(ge=0)
    column: int = Field(ge=0)


@cache
def examples() -> dict[str, str]:
    """Return the shipped sweeps by name, the quickstarts first."""
    found = {
        Path(file.name).stem: file.read_text(encoding="utf-8")
        for file in files("sweeps").iterdir()
        if file.name.endswith(".yaml")
    }
    return dict(sorted(found.items(), key=lambda item: (not item[0].startswith(_FIRST_EXAMPLE), item[0])))


def new_pages(context: ServiceContext, api: ApiCalls) -> APIRouter:
    """Return the page of a new sweep."""
    pages = APIRouter(route_class=PageRoute, include_in_schema=False)

    def editor(
        request: Request,
        text: str,
        found: Mapping[str, Any] | None = None,
        priority: str = "0",
        status: int = HTTPStatus.OK,
    ) -> Response:
        return render(
            request,
            "new.html.j2",
            status,
            text=text,
            examples=list(examples()),
            found=found,
            priority=priority,
            key=secrets.token_urlsafe(16),
        )

    @pages.get("/new")
    def new(request: Request, example: str = _FIRST_EXAMPLE, like: str = "", after: str = "") -> Response:
        """Answer with the editor, filled with an example, the file of the sweep `like`, or what to run `after` one."""
        require(request, Role.OPERATOR)
        if like:
            return editor(request, _copy_of(context, like))
        if after:
            return editor(request, suggest(after, context.root, None))
        if example not in examples():
            raise HTTPException(HTTPStatus.NOT_FOUND, f"there is no example {example!r}")
        return editor(request, examples()[example])

    @pages.post("/new")
    async def start(request: Request) -> Response:
        """Check the file of the form, or submit it."""
        person, form = require(request, Role.OPERATOR), await form_of(request)
        text = form.get("yaml", [""])[0].replace("\r\n", "\n")
        priority = form.get("priority", ["0"])[0].strip() or "0"

        def do() -> Response:
            """In a thread, since loading a file takes long."""
            if form.get("do", [""])[0] != "start":
                return editor(request, text, checked(context, api, person, text), priority)
            key = form.get("key", [""])[0][:128]
            try:
                body = {"yaml": text, "priority": priority}
                done = api.call(person, "POST", "/sweeps", body, response=Response(), idempotency_key=key)
            except _REFUSALS as error:
                return editor(request, text, _found(error), priority, HTTPStatus.UNPROCESSABLE_ENTITY)
            name = done["name"]
            texts = [f"{name} waits in the queue; it starts when its turn comes and its GPUs are free."]
            undo = ("withdraw it", f"/sweeps/{name}/actions/withdraw")
            add_notices(request, [*texts, *done["notices"]], undo)
            return RedirectResponse(f"/sweeps/{name}", HTTPStatus.SEE_OTHER)

        return await run_in_threadpool(do)

    return pages


def _copy_of(context: ServiceContext, name: str) -> str:
    """Return the file of a sweep under a free name, without default values. Raises NoSuchSweep, SpecError."""
    free = next_name(name, _taken_names(context))
    spec = context.spec(name).model_copy(update={"name": free})
    return f"# As {name}, under a free name, without settings of default values.\n{dump_spec(spec, brief=True)}"


def _taken_names(context: ServiceContext) -> set[str]:
    """Return the names that no new sweep can have."""
    waiting = context.queue.sweeps((QueueState.WAITING, QueueState.DRIVEN))
    return {*known_sweeps(context.root), *(sweep.name for sweep in waiting)}


def editor_routes(context: ServiceContext, api: ApiCalls) -> APIRouter:
    """Return what the editor's script asks for."""
    routes = APIRouter(include_in_schema=False)

    @routes.post("/new/check")
    def check(request: Request, body: Text) -> dict[str, Any]:
        """Return the findings about the text with their lines, and the plan as HTML where there are none."""
        found = checked(context, api, require(request, Role.OPERATOR), body.yaml)
        html = environment().get_template("findings.html.j2").render(found=found)
        return {"lines": sorted({each["line"] for each in found["problems"]}), "html": html}

    @routes.post("/new/complete")
    def completion(request: Request, body: Cursor) -> dict[str, Any]:
        """Return what may stand at the cursor."""
        require(request, Role.OPERATOR)
        return asdict(complete(body.yaml, body.line, body.column))

    return routes


_REFUSALS = (OrchestrateError, TrialError, HTTPException)


def checked(context: ServiceContext, api: ApiCalls, person: Person, text: str) -> dict[str, Any]:
    """Return `problems` (line, path, problem, hint), `refused`, and `plan` as the editor shows them."""
    try:
        plan = api.call(person, "POST", "/plan", {"yaml": text})
    except _REFUSALS as error:
        return _found(error)
    taken = _taken_names(context)
    if (name := plan["name"]) in taken:
        line = next((n for n, line in enumerate(text.splitlines(), 1) if line.startswith("name:")), 1)
        hint = f"free: {next_name(name, taken)}"
        problem = {"line": line, "path": "name", "problem": f"there is a sweep named {name}", "hint": hint}
        return {"problems": [problem], "refused": "", "plan": plan, "rows": _plan_rows(plan)}
    return {"problems": [], "refused": "", "plan": plan, "rows": _plan_rows(plan)}


def _found(error: Exception) -> dict[str, Any]:
    """Return a refusal, with its lines where it has some."""
    problems: list[dict[str, Any]] = []
    if isinstance(error, SpecError):
        problems = [
            {"line": _line(found.where), "path": found.path, "problem": found.problem, "hint": found.hint}
            for found in error.problems
        ]
    text = error.detail if isinstance(error, HTTPException) else str(error)
    found = {"problems": problems, "refused": "" if problems else text, "plan": None, "rows": []}
    return redact_all(found, secret_values())


def _line(where: str) -> int:
    """Return the line of a finding, from 1; the first one for a finding about the whole file."""
    last = where.rpartition(":")[2]
    return int(last) if last.isdecimal() else 1


def _plan_rows(plan: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the figures of a plan as texts."""
    estimate = plan.get("estimate") or {}
    updates, unknown = plan["updates_per_trial"], "unknown until downloaded"
    rows: list[tuple[str, Any]] = [
        ("objective", plan["goal"]),
        ("required of the best", "; ".join(plan.get("require") or ()) or "nothing"),
        *plan["searched"].items(),
        ("trials", _count(plan["trials"]) or "until the budget's hours are spent"),
        ("trials of finalists", _count(plan.get("finalists"))),
        *((f"budget.{limit}", f"{value:g}") for limit, value in plan["budget"].items()),
        ("concurrent trials", _count(plan["concurrency"]) or "none on this machine"),
        ("training pairs", _count(plan["train_pairs"]) or unknown),
        ("held-out pairs", _count(plan["eval_pairs"]) or unknown),
        ("updates per trial", _range(updates) or unknown),
        ("tokens of the sweep, at most", _count(plan["tokens_at_most"])),
        ("parameters", _count(plan["parameters"])),
        ("disk space, at most", plan.get("disk") or unknown),
        ("GPU-hours per trial, estimated", _number(estimate.get("gpu_hours_per_trial"))),
        ("GPU-hours of the sweep, estimated", _number(estimate.get("gpu_hours"))),
        ("cost of the sweep, estimated", _number(estimate.get("cost"))),
    ]
    return [(name, str(value)) for name, value in rows if value]


def _count(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.3g}"


def _range(value: Mapping[str, int] | None) -> str:
    return "" if value is None else " to ".join(dict.fromkeys([f"{value['least']:,}", f"{value['most']:,}"]))
