"""Routes of a sweep's trials: pages, one trial with settings and attempts, metrics, answers, logs."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query

from dashboards.analysis.load_frame import trial_samples
from orchestrator.api.watched_sweep import Progress, progress_of
from orchestrator.commands.request_commands import open_study, record_of
from orchestrator.commands.status import history
from orchestrator.folders import FAILURE_FILE, SweepFolder, existing_sweep, known_sweeps
from orchestrator.service.service_context import Limit, ServiceContext, Viewer, as_json
from orchestrator.study.finalists import trial_config
from orchestrator.study.reader import StudyReader
from orchestrator.study.trial_records import TrialRecord, TrialState

_MOST_POINTS = 10_000
_LOG_BYTES = 4 << 20
"""Of the driver's output; of a longer one the end is shown."""
_TRACEBACK_BYTES = 64 << 10
_MOST_LINES = 5000

Trial = Annotated[int, Path(ge=0)]
Keys = Annotated[list[str], Query(max_length=100, description="Names of metrics; all without one.")]
Since = Annotated[int, Query(ge=-1, description="Only points after this update.")]


def trial_routes(context: ServiceContext) -> APIRouter:
    """Return the routes."""
    routes, root = APIRouter(prefix="/api/v1/sweeps/{name}", tags=["trials"]), context.root

    @routes.get("/trials")
    def trials(
        _: Viewer,
        name: str,
        after: Annotated[int, Query(ge=-1)] = -1,
        state: TrialState | None = None,
        limit: Limit = 50,
    ) -> dict[str, Any]:
        """Return a page of a sweep's trials by number. `next`: `after` of the next page."""
        found = [
            trial
            for trial in context.status(name)["trials"]
            if trial["number"] > after and state in (None, trial["state"])
        ]
        shown = found[:limit]
        return {"trials": shown, "next": shown[-1]["number"] if len(found) > limit else None}

    @routes.get("/trials/{trial}")
    def trial(_: Viewer, name: str, trial: Trial) -> dict[str, Any]:
        """Return one trial: as in the status, with its whole configuration, its attempts with their tracebacks, and
        its events.
        """
        folder = existing_sweep(root, name)
        with open_study(folder, read_only=True) as study:
            record = record_of(study, trial)
            found = next(each for each in context.status(name)["trials"] if each["number"] == trial)
            return found | as_json(
                {
                    "config": trial_config(study.spec, record).model_dump(mode="json"),
                    "differs_from_best": _differences(study, record),
                    "attempt_list": _attempts(study, folder, record),
                    "events": [
                        {"seq": event.seq, "at": event.at, "kind": event.kind, "text": event.text}
                        for event in study.events()
                        if event.trial == trial
                    ],
                }
            )

    @routes.get("/trials/{trial}/metrics")
    def metrics(
        _: Viewer,
        name: str,
        trial: Trial,
        key: Keys = [],  # noqa: B006 - FastAPI copies it
        since: Since = -1,
        limit: Annotated[int, Query(ge=1, le=_MOST_POINTS)] = 2000,
    ) -> dict[str, Any]:
        """Return a trial's metrics by update. `next`: `since` of the next page; `keys`: all metrics of this page."""
        with open_study(existing_sweep(root, name), read_only=True) as study:
            record_of(study, trial)
            points = study.metric_history(trial, since)
        shown = points[:limit]
        return as_json(
            {
                "trial": trial,
                "keys": sorted({metric for point in shown for metric in point.metrics}),
                "points": _selected([{"step": point.step, "metrics": dict(point.metrics)} for point in shown], key),
                "next": shown[-1].step if len(points) > limit else None,
            }
        )

    @routes.get("/metrics")
    def all_metrics(
        _: Viewer,
        name: str,
        key: Keys = [],  # noqa: B006 - FastAPI copies it
        since: Since = -1,
        trial: Annotated[list[int], Query(max_length=500)] = [],  # noqa: B006 - FastAPI copies it
        limit: Annotated[int, Query(ge=1, le=_MOST_POINTS)] = 2000,
    ) -> dict[str, Any]:
        """Return the metrics of several trials, of all without `trial`. Trials with more than `limit` points are cut:
        `cut` has `since` of the next page of each, for the route of one trial.
        """
        with open_study(existing_sweep(root, name), read_only=True) as study:
            numbers = [number for number in sorted(study.last_steps()) if not trial or number in trial]
            left, shown, cut = _MOST_POINTS, dict[str, Any](), dict[str, int]()
            for number in numbers:
                points = study.metric_history(number, since)
                most = min(limit, left)
                if len(points) > most:
                    cut[str(number)] = points[most - 1].step if most else since
                points = points[:most]
                left -= len(points)
                rows = [{"step": point.step, "metrics": dict(point.metrics)} for point in points]
                shown[str(number)] = _selected(rows, key)
        return as_json({"trials": shown, "cut": cut})

    @routes.get("/trials/{trial}/samples")
    def samples(_: Viewer, name: str, trial: Trial) -> dict[str, Any]:
        """Return a trial's stored answers to fixed prompts by update, those of the initial model at update 0."""
        folder = existing_sweep(root, name)
        with open_study(folder, read_only=True) as study:
            record = record_of(study, trial)
        found, notices = trial_samples(folder, record)
        rows = [
            {"step": row.step, "prompt": row.prompt, "answer": row.answer, "expected": row.expected, "right": row.right}
            for row in found
        ]
        return as_json({"trial": trial, "samples": rows, "notices": notices})

    @routes.get("/progress")
    def progress(_: Viewer, name: str) -> dict[str, Any]:
        """Return what a live table shows: state, spec and every trial's record, as commands with `--server` read it."""
        sweep = context.queued(name)
        if sweep is not None and name not in known_sweeps(root):
            found = Progress(sweep.state.value, sweep.why, not sweep.state.has_ended)
        else:
            found = progress_of(existing_sweep(root, name))
            if sweep is not None and not sweep.state.has_ended:  # its next driver is about to start
                found = replace(found, is_driven=True)
        return as_json(found.as_json())

    @routes.get("/log")
    def log(
        _: Viewer,
        name: str,
        trial: Annotated[int | None, Query(ge=0)] = None,
        attempt: Annotated[int | None, Query(ge=1)] = None,
        tail: Annotated[int, Query(ge=1, le=_MOST_LINES)] = 200,
    ) -> dict[str, Any]:
        """Return the last lines of a sweep's log, or of a trial's, as `orchestrate logs`. `earlier`: lines before."""
        with context.log(name, trial, attempt, most=_LOG_BYTES) as found:
            lines = found.new_lines()
            other = found.other_logs()
        shown = lines[-tail:]
        return as_json({"lines": shown, "earlier": len(lines) - len(shown), "other_logs": other})

    @routes.get("/history")
    def show_history(
        _: Viewer, name: str, after: Annotated[int, Query(ge=0)] = 0, limit: Annotated[int, Query(ge=1, le=5000)] = 1000
    ) -> dict[str, Any]:
        """Return a sweep's events and changes, as `orchestrate history --json`, with the actions of people and of the
        service in the `queue`. `next`: `after` of the next page.
        """
        found = history(name, root, context.queue.actions(name))
        events = [event for event in found["events"] if event["seq"] > after]
        shown = events[:limit]
        return as_json(found | {"events": shown, "next": shown[-1]["seq"] if len(events) > limit else None})

    return routes


def _selected(points: list[dict[str, Any]], keys: list[str]) -> list[dict[str, Any]]:
    """Return the points with these metrics only, without those that have none of them."""
    if not keys:
        return points
    wanted = set(keys)
    found = [{**point, "metrics": {k: v for k, v in point["metrics"].items() if k in wanted}} for point in points]
    return [point for point in found if point["metrics"]]


def _differences(study: StudyReader, record: TrialRecord) -> dict[str, Any]:
    """Return the settings that differ from the best trial's, each as [this, the best]; empty without a best trial."""
    best = study.best()
    if best is None:
        return {}
    mine, other = record.params, best.trained_params
    return {path: [mine.get(path), other.get(path)] for path in {**mine, **other} if mine.get(path) != other.get(path)}


def _attempts(study: StudyReader, folder: SweepFolder, record: TrialRecord) -> list[dict[str, Any]]:
    """Return each attempt with its seconds, its slot's GPUs, and the end of its traceback where it failed."""
    found: list[dict[str, Any]] = []
    for row in study.attempts(record.number):
        path = folder.attempt(record.number, row.attempt) / FAILURE_FILE
        text = ""
        if path.is_file():
            with path.open("rb") as file:
                file.seek(max(0, path.stat().st_size - _TRACEBACK_BYTES))
                text = file.read().decode(errors="replace")
        found.append(
            {"attempt": row.attempt, "at": row.at, "seconds": row.seconds, "gpus": row.gpus, "traceback": text}
        )
    return found
