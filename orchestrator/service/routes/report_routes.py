"""Routes of what is concluded from a sweep: report, diagnosis, best trial, follow-up sweep, comparison."""

from __future__ import annotations

import csv
import io
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Annotated, Any, TypeVar

from anyio import CapacityLimiter, to_thread
from fastapi import APIRouter, Query, Response
from fastapi.responses import PlainTextResponse

from dashboards.analysis.comparison import as_json as comparison_as_json
from dashboards.diagnosis.diagnose import SweepAnalysis, analyze
from dashboards.report.comparison_page import ComparisonTable, comparison_page
from dashboards.report.html_page import page_policy, report_page
from orchestrator.commands.runs_folder.sweep_list import file_stamp
from orchestrator.commands.status import best
from orchestrator.errors import SpecError, SpecProblem
from orchestrator.folders import SweepFolder, existing_sweep, lock_holder
from orchestrator.report_data import as_json as report_as_json
from orchestrator.report_data import compare, load_sweep_frame, reasons_not_to_export, suggest
from orchestrator.service.service_context import ServiceContext, Viewer, as_json, page_html
from orchestrator.service.service_measures import Histogram
from orchestrator.spec.loading.serialization import dump_spec

T = TypeVar("T")
_KEPT_REPORTS = 8
_THREADS = 4
"""An analysis takes seconds: those who wait for one leave the threads of other requests free."""

Names = Annotated[list[str], Query(alias="name", min_length=1, max_length=20, description="Sweeps, at least two.")]


class SweepReports:
    """The analyses and pages of the sweeps looked at last; made again after the study's files changed. Thread-safe.

    One is made at a time, so that many who look at once cost one analysis.
    """

    def __init__(self, measured: Histogram) -> None:
        """`measured`: counts how long each took."""
        self._guard, self._measured = threading.Lock(), measured
        self._kept: OrderedDict[str, tuple[Any, SweepAnalysis, str]] = OrderedDict()

    def of(self, folder: SweepFolder) -> tuple[SweepAnalysis, str]:
        """Return a sweep's analysis and its report as a page. Raises NothingToReport."""
        with self._guard:
            files = file_stamp(folder)
            stamp = None if files is None else (files, lock_holder(folder))
            kept = self._kept.pop(folder.name, None)
            if kept is None or stamp is None or kept[0] != stamp:
                with self._measured.timed():
                    analysis = analyze(load_sweep_frame(folder))
                    kept = (stamp, analysis, report_page(analysis))
            self._kept[folder.name] = kept
            while len(self._kept) > _KEPT_REPORTS:
                self._kept.popitem(last=False)
            return kept[1], kept[2]


def report_routes(context: ServiceContext) -> APIRouter:
    """Return the routes."""
    routes, root = APIRouter(prefix="/api/v1", tags=["reports"]), context.root
    reports, threads = SweepReports(context.measures.report), CapacityLimiter(_THREADS)

    async def computed(work: Callable[[], T]) -> T:
        return await to_thread.run_sync(work, limiter=threads)

    @routes.get("/sweeps/{name}/report", response_class=Response)
    async def report(_: Viewer, name: str) -> Response:
        """Return the report as an HTML page, as `orchestrate report` writes it."""
        page = (await computed(lambda: reports.of(existing_sweep(root, name))))[1]
        return page_html(page, page_policy(page))

    @routes.get("/sweeps/{name}/diagnosis")
    async def diagnosis(_: Viewer, name: str) -> dict[str, Any]:
        """Return what `orchestrate report --json` prints: best trial, findings, importance, interactions."""
        return await computed(lambda: as_json(report_as_json(reports.of(existing_sweep(root, name))[0])))

    @routes.get("/sweeps/{name}/best")
    async def show_best(_: Viewer, name: str) -> dict[str, Any]:
        """Return the best configuration so far, as `orchestrate best --json`."""

        def look() -> dict[str, Any]:
            found = best(name, root)
            return as_json({**found, "do_not_use": reasons_not_to_export(name, root, found["number"])})

        return await computed(look)

    @routes.get("/sweeps/{name}/suggestion", response_class=PlainTextResponse)
    async def suggestion(_: Viewer, name: str) -> PlainTextResponse:
        """Return a follow-up sweep file as YAML, as `orchestrate suggest`."""
        text = await computed(lambda: as_json(suggest(name, root, None)))
        return PlainTextResponse(text, media_type="application/yaml")

    @routes.get("/sweeps/{name}/file", response_class=PlainTextResponse)
    def file(_: Viewer, name: str) -> PlainTextResponse:
        """Return the sweep's file as YAML, without default values; also of a sweep that waits in the queue."""
        text = as_json(dump_spec(context.spec(name), brief=True))
        return PlainTextResponse(text, media_type="application/yaml", headers=_saved_as(f"{name}.yaml"))

    @routes.get("/sweeps/{name}/trials.csv", response_class=PlainTextResponse)
    def table(_: Viewer, name: str) -> PlainTextResponse:
        """Return all trials with their settings and last metrics, for a spreadsheet."""
        text = as_json(_as_csv(context.status(name)["trials"]))
        return PlainTextResponse(text, media_type="text/csv; charset=utf-8", headers=_saved_as(f"{name}.csv"))

    @routes.get("/compare")
    async def show_comparison(_: Viewer, names: Names) -> dict[str, Any]:
        """Compare sweeps, as `orchestrate compare --json`."""
        return await computed(lambda: as_json(comparison_as_json(compare(_several(names), root, None))))

    @routes.get("/compare/table")
    async def compare_table(_: Viewer, names: Names) -> dict[str, Any]:
        """Compare sweeps in the cells and sentences that `orchestrate compare` prints."""
        return await computed(lambda: as_json(asdict(ComparisonTable.of(compare(_several(names), root, None)))))

    @routes.get("/compare/page", response_class=Response)
    async def compare_page(_: Viewer, names: Names) -> Response:
        """Compare sweeps on an HTML page, as `orchestrate compare --output`."""
        page = await computed(lambda: comparison_page(compare(_several(names), root, None)))
        return page_html(page, page_policy(page))

    return routes


_GROUPS = ("params", "metrics")
_COLUMNS = ("number", "state", "value", "step", "steps", "attempts", "origin", "reason")


def _as_csv(trials: Sequence[Mapping[str, Any]]) -> str:
    """Return a row for each trial, with the columns of `Sweep.trials()`."""
    groups = {group: list(dict.fromkeys(key for trial in trials for key in trial[group])) for group in _GROUPS}
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow([*_COLUMNS, *(f"{group}.{key}" for group, keys in groups.items() for key in keys)])
    for trial in trials:
        more = [trial[group].get(key) for group, keys in groups.items() for key in keys]
        writer.writerow([_cell(value) for value in (*(trial[name] for name in _COLUMNS), *more)])
    return out.getvalue()


def _cell(value: Any) -> Any:
    """Return a cell; a text that a spreadsheet would take for a formula gets an apostrophe."""
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") else value


def _saved_as(name: str) -> dict[str, str]:
    return {"content-disposition": f'attachment; filename="{name}"'}


def _several(names: list[str]) -> list[str]:
    found = list(dict.fromkeys(names))
    if len(found) < 2:
        raise SpecError([SpecProblem("", "name", "name at least two sweeps")])
    return found
