"""`SweepViews`: sweeps as their pages show them, read again only after their files changed and not too often.

All viewers of a sweep share one analysis, and its drawn panels, so that the number of viewers costs little.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from dashboards.analysis.sweep_frame import SweepFrame, TrialFrame
from dashboards.diagnosis.diagnose import SweepAnalysis, analyze
from dashboards.formatting import format_measured, format_settings, format_value
from dashboards.report.blocks import Chart, Charts, Code, Panel
from dashboards.report.figures import as_script
from dashboards.report.panels import PANELS, heatmaps, hyperparameters, learning_curves, response_quality
from orchestrator.commands.runs_folder.sweep_list import file_stamp
from orchestrator.commands.runs_folder.sweep_logs import SweepLog
from orchestrator.folders import SweepFolder, existing_sweep, lock_holder
from orchestrator.redaction import redact, secret_values
from orchestrator.report_data import load_sweep_frame
from orchestrator.service.page.page_rendering import environment
from orchestrator.study.study import Study
from orchestrator.study.trial_records import TrialState
from trainer.metrics import CHOSEN, MARGIN

_MOST_VIEWS, _MOST_DRAWN = 8, 48
_LEAST_SECONDS, _COST_FACTOR = 0.5, 14.0
"""A view is read again after this time and after so many times the seconds that reading and drawing it took."""
_MOST_SECONDS, _LARGE_FACTOR = 5.0, 4.0
"""The latter is at most five seconds, of a large sweep four times what it took."""
_TIME_RESOLUTION = 0.1
_LOG_LINES = 200
_MOST_SELECTED = 12
_FILTERED = (
    heatmaps.heatmap_panel,
    learning_curves.learning_curves_panel,
    hyperparameters.parallel_panel,
    hyperparameters.importance_panel,
    response_quality.collapse_panel,
)
"""Panels that draw the trials that the reader's filters leave; the others are about the whole sweep."""
TRIAL_STATES = ("complete", "running", "interrupted", "paused", "pruned", "diverged", "failed")
"""States of trials as pages show them (`shown_state`); each trial has one."""


@dataclass(frozen=True, slots=True)
class Shown:
    """What a reader of a sweep wants to see: the trials in the charts, those selected, and the order of the table."""

    hide: frozenset[str] = frozenset()
    """Of TRIAL_STATES."""
    best: int | None = None
    """So many of the best complete trials."""
    only: str = ""
    """One value of one setting, as PATH=VALUE."""
    select: frozenset[str] = frozenset()
    """Labels of trials."""
    sort: str = "best"

    @classmethod
    def of_query(cls, query: Mapping[str, list[str]]) -> Shown:
        """Return what the query of a URL asks for; what it has of other values is left out."""
        best = next(iter(query.get("best", [])), "")
        return cls(
            frozenset(TRIAL_STATES) & frozenset(query.get("hide", [])),
            int(best) if best.isdecimal() and 0 < int(best) < 10_000 else None,
            next(iter(query.get("only", [])), "")[:300],
            frozenset([label for label in query.get("select", []) if label][:_MOST_SELECTED]),
            next((each for each in query.get("sort", []) if each in SORTS), "best"),
        )

    def narrowed(self, frame: SweepFrame) -> SweepFrame:
        """Return the frame with the trials that its charts show."""
        kept = [trial for trial in frame.trials if shown_state(frame, trial) not in self.hide]
        if self.only:
            kept = [trial for trial in kept if self.only in settings_of(frame, trial)]
        if self.best is not None:
            numbers = {trial.number for trial in [t for t in frame.ranked if t in kept][: self.best]}
            kept = [trial for trial in kept if trial.number in numbers]
        return replace(frame, trials=tuple(kept), selected=self.select)


def settings_of(frame: SweepFrame, trial: TrialFrame) -> frozenset[str]:
    """Return the trial's searched settings as PATH=VALUE, as the filter names them."""
    return frozenset(
        f"{path}={format_value(trial.record.params[path])}" for path in frame.paths if path in trial.record.params
    )


def shown_state(frame: SweepFrame, trial: TrialFrame) -> str:
    """Return a trial's state as `status` prints it: a running trial of a sweep that no driver runs is interrupted."""
    is_idle = trial.record.state is TrialState.RUNNING and frame.state not in ("running", "paused")
    return "interrupted" if is_idle else trial.state_label.lower()


def state_counts(frame: SweepFrame) -> dict[str, int]:
    """Return how many trials of the sweep's table are in each of TRIAL_STATES."""
    counts = Counter(shown_state(frame, trial) for trial in frame.trials)
    return {word: counts[word] for word in TRIAL_STATES}


def _by_rank(frame: SweepFrame) -> Callable[[TrialFrame], Any]:
    ranks = {trial.number: rank for rank, trial in enumerate(frame.ranked)}

    def order(trial: TrialFrame) -> Any:
        value = frame.value(trial)
        return (ranks.get(trial.number, len(ranks)), value is None, -frame.sign * (value or 0.0), trial.number)

    return order


SORTS: Mapping[str, Callable[[SweepFrame], Callable[[TrialFrame], Any]]] = {
    "best": _by_rank,
    "number": lambda _: lambda trial: trial.number,
    "state": lambda frame: lambda trial: (shown_state(frame, trial), trial.number),
    "newest": lambda _: lambda trial: -trial.number,
}


@dataclass(frozen=True)
class DrawnPanel:
    """One section of a page: its HTML and the plotly figures of its charts, by the id that a chart has in the HTML."""

    key: str
    title: str
    html: str
    figures: dict[str, Any] = field(default_factory=dict[str, Any])

    @cached_property
    def digest(self) -> str:
        """Tells the content from an older one."""
        return _digest(self.html + self.figures_json)

    @cached_property
    def shape(self) -> str:
        """Tells the HTML from an older one: where only the figures are new, charts are redrawn in their places."""
        return _digest(self.html)

    @cached_property
    def figures_json(self) -> str:
        """The figures as JSON for a script element."""
        return as_script(self.figures)

    @cached_property
    def as_json(self) -> bytes:
        """The panel as a page's script receives it."""
        content = {name: getattr(self, name) for name in ("key", "title", "digest", "shape", "html")}
        return f'{json.dumps(content)[:-1]}, "figures": {self.figures_json}}}'.encode(errors="replace")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class SweepView:
    """A sweep at one moment. `analysis`: None before a trial has started."""

    name: str
    stamp: str
    state: str
    analysis: SweepAnalysis | None
    log: tuple[str, ...]

    @property
    def frame(self) -> SweepFrame | None:
        """The sweep's data."""
        return None if self.analysis is None else self.analysis.frame


class SweepViews:
    """The views of a runs folder's sweeps. Thread-safe."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._guard = threading.Lock()
        self._busy: dict[str, threading.Lock] = {}
        self._drawing: dict[str, threading.Lock] = {}
        self._views: OrderedDict[str, SweepView] = OrderedDict()
        self._next: dict[str, float] = {}
        """By sweep: when it may be read again, by the monotonic clock."""
        self._drawn: OrderedDict[tuple[str, str, Shown], list[DrawnPanel]] = OrderedDict()

    def stamp(self, name: str) -> str:
        """Return what changes with anything that the sweep's page shows; costs a few looks at files."""
        folder = existing_sweep(self._root, name)
        files, now = file_stamp(folder), time.time()
        if files is None:  # a study in another database: looked at every few seconds
            return f"{lock_holder(folder)} {now // 3:.0f}" if Study.exists(folder) else f"{lock_holder(folder)}"
        is_stable = max(times[0] for times in files) < (now - _TIME_RESOLUTION) * 1e9
        log = folder.log.stat().st_size if folder.log.is_file() else 0
        return hashlib.sha256(f"{files} {lock_holder(folder)} {is_stable} {log}".encode()).hexdigest()[:16]

    def view(self, name: str) -> SweepView:
        """Return the sweep's view, which may be a little older than its files: while one reads, others get the last."""
        stamp = self.stamp(name)
        with self._guard:
            busy = self._busy.setdefault(name, threading.Lock())
            last = self._views.get(name)
        if last is not None and (self._may_stay(last, stamp) or not busy.acquire(blocking=False)):
            return last
        if last is None:
            busy.acquire()
        try:
            last = self._views.get(name)
            if last is not None and self._may_stay(last, stamp):  # another thread has read it meanwhile
                return last
            began = time.monotonic()
            view = self._read(existing_sweep(self._root, name), stamp)
            self.add_cost(name, time.monotonic() - began)
            if last is not None:  # it is followed: no request waits for its panels
                self.panels(view, Shown())
            with self._guard:
                self._views[name] = view
                self._views.move_to_end(name)
                while len(self._views) > _MOST_VIEWS:
                    self._views.popitem(last=False)
            return view
        finally:
            busy.release()

    def _may_stay(self, view: SweepView, stamp: str) -> bool:
        return view.stamp == stamp or self.rest_seconds(view.name) > 0

    def rest_seconds(self, name: str) -> float:
        """Return for how long `view` will return the same."""
        return max(0.0, self._next.get(name, 0.0) - time.monotonic())

    def add_cost(self, name: str, seconds: float) -> None:
        """Count work on the sweep's page, after which it rests for a multiple."""
        now = time.monotonic()
        rest = min(_COST_FACTOR * seconds, max(_MOST_SECONDS, _LARGE_FACTOR * seconds))
        self._next[name] = max(self._next.get(name, now), now + _LEAST_SECONDS) + rest

    def _read(self, folder: SweepFolder, stamp: str) -> SweepView:
        with SweepLog.open(folder.name, self._root) as log:
            lines = tuple(log.new_lines()[-_LOG_LINES:])
        if not Study.exists(folder):
            state = "preparing" if lock_holder(folder) else "interrupted"
            return SweepView(folder.name, stamp, state, None, lines)
        analysis = analyze(load_sweep_frame(folder))
        return SweepView(folder.name, stamp, analysis.frame.state, analysis, lines)

    def panels(self, view: SweepView, shown: Shown) -> list[DrawnPanel]:
        """Return the panels of a sweep's page."""
        key = (view.name, view.stamp, shown)
        with self._guard:
            drawing = self._drawing.setdefault(view.name, threading.Lock())
            found = self._drawn.get(key)
        if found is not None:
            return found
        with drawing:
            if (found := self._drawn.get(key)) is not None:  # another thread has drawn them meanwhile
                return found
            began = time.monotonic()
            drawn = _draw(view, shown)
            self.add_cost(view.name, time.monotonic() - began)
            with self._guard:
                self._drawn[key] = drawn
                while len(self._drawn) > _MOST_DRAWN:
                    self._drawn.popitem(last=False)
            return drawn


def _draw(view: SweepView, shown: Shown) -> list[DrawnPanel]:
    drawn: list[DrawnPanel] = []
    if view.analysis is not None:
        whole = view.analysis
        part = replace(whole, frame=shown.narrowed(whole.frame))
        for draw in PANELS:
            panel = draw(part if draw in _FILTERED else whole)
            if panel is not None:
                drawn.append(draw_panel(panel))
        table = DrawnPanel("live", "Trials", _trial_table(whole.frame, part.frame, shown))
        drawn.insert(min(1, len(drawn)), table)
    if view.log:
        lines = redact("\n".join(view.log), secret_values())
        lead = f"The last {_LOG_LINES} lines." if len(view.log) >= _LOG_LINES else ""
        drawn.append(draw_panel(Panel("log", "Log", lead, (Code("Events and the driver's output", lines),))))
    return drawn


def draw_panel(panel: Panel) -> DrawnPanel:
    """Return a panel's HTML and figures."""
    charts: list[Chart] = [chart for block in panel.blocks if isinstance(block, Charts) for chart in block.charts]
    ids = {id(chart): f"{panel.key}-{position}" for position, chart in enumerate(charts)}

    def chart_index(chart: Chart) -> str:
        return ids[id(chart)]

    html = environment().get_template("panel.html.j2").render(panel=panel, chart_index=chart_index)
    return DrawnPanel(panel.key, panel.title, html, {ids[id(chart)]: chart.figure for chart in charts})


def _measured_column(values: Sequence[float | None]) -> list[str]:
    return ["–" if value is None else text for value, text in zip(values, format_measured(values, 3), strict=True)]


def _trial_table(frame: SweepFrame, part: SweepFrame, shown: Shown) -> str:
    """Return the table of all trials with their decisions; those that the filters hide are left out."""
    visible = {trial.number for trial in part.trials}
    trials = sorted((trial for trial in frame.trials if trial.number in visible), key=SORTS[shown.sort](frame))
    best = frame.eligible[0].number if frame.eligible else None
    columns = [format_settings([trial.record.params.get(path) for trial in trials]) for path in frame.paths]
    values = _measured_column([frame.value(trial) for trial in trials])
    margins = _measured_column([trial.last(MARGIN) for trial in trials])
    chosen = _measured_column([trial.last(CHOSEN) for trial in trials])
    rows = [
        {
            "label": trial.label,
            "number": trial.number,
            "state": shown_state(frame, trial),
            "is_best": trial.number == best,
            "is_selected": trial.label in shown.select,
            "settings": [column[k] for column in columns],
            "at": trial.curves.last_update,
            "planned": trial.planned_updates,
            "value": values[k],
            "margin": margins[k],
            "chosen": chosen[k],
            "decision": _decision(trial),
        }
        for k, trial in enumerate(trials)
    ]
    return (
        environment()
        .get_template("trial_table.html.j2")
        .render(
            name=frame.name,
            rows=rows,
            hidden=len(frame.trials) - len(trials),
            settings=[frame.short_names.get(path, path) for path in frame.paths],
            metric=frame.objective.metric.removeprefix("eval_"),
        )
    )


def _decision(trial: TrialFrame) -> str:
    """Return why the trial is in its state, or what speaks against it."""
    record = trial.record
    broken = f"breaks {'; '.join(record.breaks)}" if record.breaks else ""
    return "; ".join(part for part in (record.reason, broken, record.origin) if part)


def filter_values(frame: SweepFrame) -> list[tuple[str, Sequence[str]]]:
    """Return the searched settings, each with the values that trials have, as PATH=VALUE; settings of one value not."""
    found: list[tuple[str, Sequence[str]]] = []
    for path in frame.paths:
        values = {
            repr(trial.record.params[path]): trial.record.params[path]
            for trial in frame.trials
            if path in trial.record.params
        }
        if 1 < len(values) <= 40:
            listed = sorted(values.values(), key=lambda value: (isinstance(value, str), value))
            found.append((path, [f"{path}={format_value(value)}" for value in listed]))
    return found
