"""Pages of one sweep, of its trials, and of its actions; the page of a sweep follows it while it runs."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from fastapi import APIRouter, HTTPException, Request, Response
from fastapi.responses import RedirectResponse
from markupsafe import Markup
from starlette.concurrency import run_in_threadpool

from dashboards.analysis.run_costs import costs
from dashboards.analysis.sweep_frame import SweepFrame, TrialFrame
from dashboards.diagnosis.diagnose import SweepAnalysis
from dashboards.formatting import format_brief, format_hours, format_settings, format_value
from dashboards.report.blocks import Code, KeyFigure, KeyFigures, Panel, Paragraph, Table
from dashboards.report.figures import as_script
from dashboards.report.panels.learning_curves import learning_curves_panel
from dashboards.report.panels.response_quality import compared_samples
from orchestrator.commands.request_commands import open_study
from orchestrator.commands.runs_folder.archive_records import archived_sweeps
from orchestrator.commands.runs_folder.sweep_list import ARCHIVED
from orchestrator.commands.runs_folder.sweep_logs import SweepLog
from orchestrator.errors import NoSuchSweep, OrchestrateError
from orchestrator.folders import FAILURE_FILE, SweepFolder, existing_sweep
from orchestrator.service.access_tokens import Role
from orchestrator.service.hosting.mlflow_server import MLFLOW_PATH
from orchestrator.service.page.action_subjects import Subject
from orchestrator.service.page.api_calls import ApiCalls
from orchestrator.service.page.page_rendering import PageRoute, add_notices, form_of, render
from orchestrator.service.page.sweep_actions import Action, actions_for, find_action
from orchestrator.service.page.sweep_views import (
    SORTS,
    DrawnPanel,
    Shown,
    SweepViews,
    draw_panel,
    filter_values,
    shown_state,
    state_counts,
)
from orchestrator.service.request_guard import require
from orchestrator.service.service_context import ServiceContext
from orchestrator.service.sweep_queue import QueueState
from trainer.results import TrialError

_LOG_LINES = 400
_LOG_BYTES = 1 << 20
_LEAST_REST = 1.0
"""Seconds after which a page asks again for what is being read."""
_TRIAL_REST = 50.0
"""Times the seconds that drawing a trial took, after which its page asks again: each reader draws it anew."""


def sweep_pages(context: ServiceContext, views: SweepViews, api: ApiCalls) -> APIRouter:
    """Return the pages of the sweeps of one runs folder. `api`: what the buttons do."""
    root = context.root
    pages = APIRouter(route_class=PageRoute, include_in_schema=False)

    def subject(name: str, number: int | None = None) -> Subject:
        """Return what a page or an action is about. Raises NoSuchSweep."""
        queued = context.queued(name)
        try:
            view = views.view(name)
        except NoSuchSweep:
            state = ARCHIVED if any(found.name == name for found in archived_sweeps(root)) else ""
            if queued is not None and not state:
                state = "starting" if queued.state is QueueState.DRIVEN else queued.state.value
            if not state or number is not None:
                raise
            return Subject(context, name, state, queued, None)
        trial = None
        if number is not None:
            trial = None if view.frame is None else _trial(view.frame, number)
            if trial is None:
                raise HTTPException(HTTPStatus.NOT_FOUND, f"{name} has no trial {number}")
        begun = view.frame is not None and view.state in ("running", "paused")
        will_be_paused = begun and _will_be_paused(SweepFolder(root, name), number)
        return Subject(context, name, view.state, queued, view.frame, trial, will_be_paused)

    def tracking(of: Subject) -> str:
        """Return where a sweep's or a trial's runs are in MLflow; "" for another database of this machine."""
        found = "" if of.frame is None else context.mlflow.url_of(SweepFolder(root, of.name), of.frame.spec)
        return f"{of.url}{MLFLOW_PATH}" if found == MLFLOW_PATH else found

    @pages.get("/sweeps/{name}")
    def sweep(request: Request, name: str) -> Response:
        """Answer with the page of a sweep."""
        person = require(request, Role.VIEWER)
        of, shown = subject(name), Shown.of_query(_query(request))
        drawn: list[DrawnPanel] = []
        if SweepFolder(root, name).spec.is_file():
            drawn = views.panels(views.view(name), shown)
            output = ""
        else:
            output = _driver_output(context, name) if of.queued is not None else ""
        figures = {key: figure for panel in drawn for key, figure in panel.figures.items()}
        return render(
            request,
            "sweep.html.j2",
            of=of,
            shown=shown,
            panels=[(panel, Markup(panel.html)) for panel in drawn],
            figures=Markup(as_script(figures)),
            actions=actions_for(api, of, person),
            filters=[] if of.frame is None else filter_values(of.frame),
            states={} if of.frame is None else state_counts(of.frame),
            sorts=list(SORTS),
            tracking=tracking(of),
            output=output,
            is_judged=of.is_judged,
            judge_failed=of.judge_failure,
            place=_place(context, name) if of.is_waiting else "",
            has_file=bool(drawn) or (of.queued is not None and bool(of.queued.spec)),
        )

    @pages.get("/sweeps/{name}/trials/{number}")
    def trial(request: Request, name: str, number: int) -> Response:
        """Answer with the page of a trial."""
        person = require(request, Role.VIEWER)
        of = subject(name, number)
        analysis = views.view(name).analysis
        assert of.trial is not None
        assert of.frame is not None
        assert analysis is not None
        drawn = [draw_panel(panel) for panel in _trial_panels(root, analysis, of.trial)]
        figures = {key: figure for panel in drawn for key, figure in panel.figures.items()}
        numbers = sorted(trial.number for trial in of.frame.all_trials)
        place = numbers.index(number)
        return render(
            request,
            "trial.html.j2",
            of=of,
            panels=[(panel, Markup(panel.html)) for panel in drawn],
            figures=Markup(as_script(figures)),
            actions=actions_for(api, of, person),
            tracking=tracking(of),
            state=shown_state(of.frame, of.trial),
            before=numbers[place - 1] if place else None,
            after=numbers[place + 1] if place + 1 < len(numbers) else None,
        )

    def confirm(
        request: Request, of: Subject, action: Action, values: Mapping[str, str], problem: str = "", status: int = 200
    ) -> Response:
        what = of.name if of.trial is None else f"trial {of.trial.label} of {of.name}"
        try:
            found = list(action.costs(of))
        except OrchestrateError as error:  # as for a deletion whose MLflow cannot be read
            found, problem = [], problem or str(error)
        return render(
            request,
            "action.html.j2",
            status,
            of=of,
            subject=of,
            action=action,
            what=what,
            values=values,
            problem=problem,
            costs=found,
        )

    @pages.get("/sweeps/{name}/actions/{key}")
    @pages.get("/sweeps/{name}/trials/{number}/actions/{key}")
    def ask(request: Request, name: str, key: str, number: int | None = None) -> Response:
        """Answer with the confirmation of an action, which says what it costs."""
        of = subject(name, number)
        action = find_action(of, key)
        require(request, api.role(action.method, action.path))
        query = _query(request)
        values = {
            field.name: query[field.name][0] if field.name in query else field.value(of) for field in action.fields
        }
        return confirm(request, of, action, values)

    @pages.post("/sweeps/{name}/actions/{key}")
    @pages.post("/sweeps/{name}/trials/{number}/actions/{key}")
    async def act(request: Request, name: str, key: str, number: int | None = None) -> Response:
        person, form = require(request, Role.VIEWER), await form_of(request)

        def do() -> Response:
            """In a thread, since actions read the study."""
            of = subject(name, number)
            action = find_action(of, key)
            require(request, api.role(action.method, action.path))
            given = {field.name: form.get(field.name, [""])[0] for field in action.fields}
            try:
                notices = list(action.run(api, of, person, given))
            except (OrchestrateError, TrialError) as error:
                return confirm(request, of, action, given, str(error), HTTPStatus.UNPROCESSABLE_ENTITY)
            except HTTPException as error:
                return confirm(request, of, action, given, error.detail, error.status_code)
            add_notices(request, notices, None if action.undo is None else action.undo(of))
            return RedirectResponse(action.leads_to or of.url, HTTPStatus.SEE_OTHER)

        return await run_in_threadpool(do)

    return pages


def _will_be_paused(folder: SweepFolder, trial: int | None) -> bool:
    with open_study(folder, read_only=True) as study:
        return study.will_be_paused(trial)


def _driver_output(context: ServiceContext, name: str) -> str:
    with context.log(name, most=_LOG_BYTES) as log:
        return "\n".join(log.new_lines()[-_LOG_LINES:])


def _place(context: ServiceContext, name: str) -> str:
    """Return the place of a waiting sweep in the queue, and what is before it."""
    found = context.queue.sweeps((QueueState.DRIVEN, QueueState.WAITING))
    waiting = [sweep.name for sweep in found if sweep.state is QueueState.WAITING]
    if name not in waiting:  # it was started meanwhile
        return ""
    position = waiting.index(name)
    paused = {entry.values["name"] for entry in context.listed() if entry.values["state"] == "paused"}
    driven = [sweep.name for sweep in found if sweep.state is QueueState.DRIVEN]
    running = ", ".join(f"{each} (paused, keeps its GPUs)" if each in paused else each for each in driven)
    before = f", after {', '.join(waiting[:position])}" if position else ""
    started = f" Started: {running}." if running else ""
    return f"Place {position + 1} of {len(waiting)} in the queue{before}.{started}"


def live_routes(root: Path, views: SweepViews) -> APIRouter:
    """Return what the scripts of a sweep's and a trial's page ask for after an event: the panels that changed."""
    routes = APIRouter(include_in_schema=False)

    @routes.get("/sweeps/{name}/panels")
    def panels(request: Request, name: str) -> Response:
        """Return the panels that the page does not have.

        `again`: the sweep has changed since they were read; `rest`: seconds until they may be read again.
        """
        require(request, Role.VIEWER)
        query = _query(request)
        view = views.view(name)
        drawn = views.panels(view, Shown.of_query(query))
        again = view.stamp != views.stamp(name)
        rest = max(views.rest_seconds(name), _LEAST_REST if again else 0.0)
        states = {} if view.frame is None else state_counts(view.frame)
        head = {"state": view.state, "states": states, "again": again, "rest": round(rest, 3)}
        return _changed(query, drawn, head)

    @routes.get("/sweeps/{name}/trials/{number}/panels")
    def trial_panels(request: Request, name: str, number: int) -> Response:
        """Return the panels that the trial's page does not have; they rest in proportion to what drawing them took.

        `again`: the sweep has changed since they were read, maybe in this trial.
        """
        require(request, Role.VIEWER)
        began, view = time.monotonic(), views.view(name)
        trial = None if view.frame is None else _trial(view.frame, number)
        if trial is None or view.analysis is None:
            raise HTTPException(HTTPStatus.NOT_FOUND, f"{name} has no trial {number}")
        drawn = [draw_panel(panel) for panel in _trial_panels(root, view.analysis, trial)]
        rest = max(_LEAST_REST, views.rest_seconds(name), _TRIAL_REST * (time.monotonic() - began))
        again = view.stamp != views.stamp(name)
        head = {"state": shown_state(view.analysis.frame, trial), "again": again, "rest": round(rest, 3)}
        return _changed(_query(request), drawn, head)

    return routes


def _changed(query: Mapping[str, list[str]], drawn: Sequence[DrawnPanel], head: Mapping[str, Any]) -> Response:
    """Return the panels that a page lacks, and the keys of all."""
    has = set(query.get("have", []))
    changed = b",".join(panel.as_json for panel in drawn if panel.digest not in has)
    keys = json.dumps([panel.key for panel in drawn])
    begin = f'{json.dumps(head)[:-1]}, "keys": {keys}, "panels": ['.encode()
    return Response(b"%b%b]}" % (begin, changed), media_type="application/json")


def _query(request: Request) -> dict[str, list[str]]:
    return parse_qs(request.url.query, keep_blank_values=True, max_num_fields=200)


def _trial(frame: SweepFrame, number: int) -> TrialFrame | None:
    return next((trial for trial in frame.all_trials if trial.number == number), None)


def _trial_panels(root: Path, analysis: SweepAnalysis, trial: TrialFrame) -> list[Panel]:
    frame = analysis.frame
    winner = frame.eligible[0] if frame.eligible else None
    other = None if winner is None or winner.number == trial.number else winner
    panels = [_result_panel(frame, trial), _settings_panel(trial, other, is_best=winner is not None and other is None)]
    drawn = (trial,) if other is None else (trial, other)
    chosen = replace(frame, trials=drawn, selected=frozenset(each.label for each in drawn))
    curves = learning_curves_panel(replace(analysis, frame=chosen))
    if curves is not None:
        panels.append(curves)
    if blocks := compared_samples([(f"trial {each.label}", each) for each in drawn]):
        panels.append(Panel("samples", "Samples", "Greedy answers to fixed held-out prompts.", blocks))
    return [*panels, *_attempt_panels(root, frame, trial)]


def _result_panel(frame: SweepFrame, trial: TrialFrame) -> Panel:
    record = trial.record
    start, best = frame.initial_value(frame.objective.metric), frame.eligible[0] if frame.eligible else None
    if record.finalist_of is not None:  # measured on other rows than the search
        start, best = trial.first(frame.objective.metric), None
    notes = [
        "" if start is None else f"{format_brief(start)} before training",
        ""
        if best is None or best.number == trial.number
        else f"the best, trial {best.label}: {format_brief(frame.value(best))}",
    ]
    planned = f" of {trial.planned_updates}" if trial.planned_updates else ""
    unit = "GPU-hours" if frame.gpus else "slot-hours"
    figures = (
        KeyFigure(frame.objective.metric, format_brief(frame.value(trial)), "; ".join(note for note in notes if note)),
        KeyFigure("updates", f"{trial.curves.last_update}{planned}"),
        KeyFigure("attempts", str(record.attempts)),
        KeyFigure(unit, format_hours(costs([trial]).seconds)),
    )
    texts = [record.reason, f"breaks {'; '.join(record.breaks)}" if record.breaks else "", record.origin]
    return Panel("result", "Result", "", (KeyFigures(figures), *(Paragraph(text) for text in texts if text)))


def _settings_panel(trial: TrialFrame, winner: TrialFrame | None, *, is_best: bool) -> Panel:
    """Return every setting of the trial; those that differ from the winner's come first and are marked.

    `winner`: None for the winner itself (`is_best`), and where there is none yet.
    """
    own = _flat(trial.config.model_dump(mode="json"))
    others = own if winner is None else _flat(winner.config.model_dump(mode="json"))
    paths = list(dict.fromkeys([*own, *others]))
    differing = [path for path in paths if own.get(path, _ABSENT) != others.get(path, _ABSENT)]
    rows = [(path, *_shown_alike(own, others, path)) for path in differing]
    same = [(path, _shown(own, path)) for path in paths if path not in differing]
    blocks: list[Any] = []
    lead = "This is the best trial so far." if is_best else "There is no best trial yet to compare them with."
    if winner is not None:
        head = ("setting", f"trial {trial.label}", f"the best, trial {winner.label}")
        lead = f"{len(rows)} differ{'s' if len(rows) == 1 else ''} from the best trial."
        if rows:
            blocks.append(Table(head, tuple(rows), marked=frozenset(range(len(rows)))))
    title = "All settings" if winner is None else f"The {len(same)} settings that are the same"
    blocks.append(Table(("setting", "value"), tuple(same), folded=title))
    return Panel("settings", "Settings", lead, blocks)


_ABSENT = object()


def _shown_alike(own: Mapping[str, Any], others: Mapping[str, Any], path: str) -> tuple[str, str]:
    """Return both values with one number format."""
    if path in own and path in others:
        first, second = format_settings([own[path], others[path]])
        return first, second
    return _shown(own, path), _shown(others, path)


def _shown(values: Mapping[str, Any], path: str) -> str:
    return format_value(values[path]) if path in values else "–"


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def _attempt_panels(root: Path, frame: SweepFrame, trial: TrialFrame) -> list[Panel]:
    """Return the failures of earlier attempts, each attempt's traceback, and the trial's log."""
    folder, number = existing_sweep(root, frame.name), trial.number
    rows = tuple((str(each.attempt), str(each.step), each.reason) for each in trial.record.failed_attempts)
    blocks: list[Any] = [Table(("attempt", "update", "failed with"), rows)] if rows else []
    for path in sorted(folder.trial(number).glob("*/" + FAILURE_FILE), key=lambda path: int(path.parent.name)):
        text = path.read_text(encoding="utf-8", errors="replace")
        blocks.append(Code(f"Traceback of attempt {path.parent.name}", text, folded=bool(blocks)))
    panels = [Panel("attempts", "Attempts", "", blocks)] if blocks else []
    with SweepLog.open(frame.name, root, number) as log:
        lines = log.new_lines()[-_LOG_LINES:]
    return [*panels, Panel("log", "Log", "", (Code("Events and metrics", "\n".join(lines), folded=True),))]
