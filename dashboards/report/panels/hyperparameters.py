"""What matters: how much of the goal's spread each leaf explains, and the goal along each leaf.

Parallel coordinates, drawn as lines: they print, need no WebGL, and a finger can point at one.

Several goals: the trials that no other one beats in all of them.
"""

from __future__ import annotations

import math
from typing import Any

import plotly.graph_objects as go

from dashboards.analysis.param_effects import is_log, is_numeric, levels
from dashboards.analysis.sweep_frame import SweepFrame, TrialCase, brief, show
from dashboards.diagnosis.diagnose import Insight
from dashboards.report.blocks import Block, Chart, Charts, Panel, Table
from dashboards.report.figures import BLUE, FAINT, GREY, PAPER, VERMILION, end_of, figure, plain, shade
from orchestrator.spec.objectives import Goal
from trainer.metrics import EVAL


def importance_panel(seen: Insight) -> Panel | None:
    """fANOVA's shares, then a slice for each leaf."""
    frame = seen.frame
    slices = [_slice(frame, path) for path in frame.paths if len(levels(frame, path)) > 1]
    if not slices:
        return None
    blocks: list[Block] = []
    if seen.importances:
        blocks.append(Charts((_bars(seen),), wide=True))
    blocks.append(Charts(tuple(slices)))
    lead = "Each dot is a trial; the line joins the means of complete trials."
    if seen.importances:
        lead = (
            "Share of the goal's variance that each leaf explains among the complete trials (fANOVA: a random forest, "
            "so a rough guide with few trials). " + lead
        )
    return Panel("importance", "What matters", lead, blocks)


def _bars(seen: Insight) -> Chart:
    shares = list(reversed(seen.importances.items()))
    trace = go.Bar(
        x=[share for _, share in shares],
        y=[plain(seen.frame.short.get(path, path)) for path, _ in shares],
        orientation="h",
        marker={"color": BLUE},
        text=[f"{share:.0%}" for _, share in shares],
        textposition="auto",
        hovertemplate="%{y}: %{x:.1%}<extra></extra>",
        cliponaxis=False,
    )
    layout = figure(
        [trace],
        xaxis={"tickformat": ".0%", "range": [0, 1], "fixedrange": True},
        yaxis={"automargin": True, "fixedrange": True},
        bargap=0.35,
        margin={"l": 20, "r": 20, "t": 6, "b": 34},
    )
    return Chart(layout, "Importance (fANOVA)", "Importance of each searched leaf", 70 + 34 * len(shares))


def _slice(frame: SweepFrame, path: str) -> Chart:
    best = frame.ranked[0] if frame.ranked else None
    cases = [c for c in frame.trials if path in c.record.params and frame.value(c) is not None]
    cases.sort(key=lambda case: case is best)  # drawn last, on top
    numeric, log = is_numeric(frame, path), is_log(frame, path)

    def place(value: Any) -> Any:
        return value if numeric else plain(show(value))

    dots = go.Scatter(
        x=[place(case.record.params[path]) for case in cases],
        y=[frame.value(case) for case in cases],
        mode="markers",
        marker={
            "color": [VERMILION if case is best else end_of(case)[0] for case in cases],
            "symbol": ["star" if case is best else end_of(case)[1] for case in cases],
            "size": [13 if case is best else 7 for case in cases],
            "opacity": 0.8,
            "line": {"width": 0},
        },
        text=[f"trial {plain(case.label)}, {case.end_word.lower()}<br>{plain(frame.words(case))}" for case in cases],
        hovertemplate="%{text}<br>%{y:.4g}<extra></extra>",
    )
    traces: list[Any] = [dots]
    found = levels(frame, path)
    if len(found) <= 12:
        means = go.Scatter(
            x=[place(level.value) for level in found],
            y=[level.mean for level in found],
            mode="lines",
            line={"color": GREY, "width": 1.5},
            hoverinfo="skip",
        )
        traces.insert(0, means)
    axis: dict[str, Any] = {"title": {"text": plain(path)}}
    if numeric:
        values = [level.value for level in found]
        axis |= {"type": "log"} if log else {}
        axis |= {"range": _padded([c.record.params[path] for c in cases], log)}
        if len(values) <= 6:
            axis |= {"tickvals": values, "ticktext": [show(value) for value in values]}
    else:
        axis |= {"type": "category"}
    made = figure(traces, xaxis=axis, yaxis={"zeroline": False}, margin={"l": 54, "r": 12, "t": 6, "b": 42})
    title = f"{frame.goal.metric.removeprefix(EVAL)} by {frame.short.get(path, path)}"
    return Chart(made, title, f"{frame.goal.metric} along {path}", 250)


def _padded(values: list[Any], log: bool) -> list[float]:
    """The axis's range with room at both ends, so that no mark is cut; plotly's log axes count in powers of ten."""
    placed = [math.log10(value) if log else float(value) for value in values]
    room = 0.08 * (max(placed) - min(placed)) or 0.5
    return [min(placed) - room, max(placed) + room]


_SHADES = 12
_DARKEST = 0.35
"""Of the scale of colours: a thin line below this is lost on a dark page."""
_PER_AXIS = 120
_MISSING = -0.12


def parallel_panel(seen: Insight) -> Panel | None:
    """A vertical axis for each searched leaf and one for the goal; a line for each trial that has a value."""
    frame = seen.frame
    shown = [case for case in frame.trials if frame.value(case) is not None]
    paths = [p for p in frame.paths if len({repr(c.record.params[p]) for c in shown if p in c.record.params}) > 1]
    if len(shown) < 3 or len(paths) < 2:
        return None
    values = [value for case in shown if (value := frame.value(case)) is not None]
    low, high = min(values), max(values)
    axes = [_Axis(frame, shown, path) for path in paths]
    lines: dict[int, list[tuple[TrialCase, list[float]]]] = {}
    for case in shown:
        value = frame.value(case)
        assert value is not None
        share = 0.5 if high == low else (value - low) / (high - low)
        level = round((share if frame.sign > 0 else 1 - share) * (_SHADES - 1))
        lines.setdefault(level, []).append((case, [*(axis.place(case) for axis in axes), share]))
    traces: list[Any] = [_lines(frame, level, lines[level]) for level in sorted(lines)]
    if frame.ranked:
        best = next(row for rows in lines.values() for row in rows if row[0] is frame.ranked[0])
        traces.append(_lines(frame, _SHADES - 1, [best], width=4.5))
    notes = [note for k, axis in enumerate(axes) for note in axis.notes(k)]
    notes += _goal_notes(frame, len(axes), low, high)
    lacking = any(axis.some_lack for axis in axes)
    line = {"color": GREY, "width": 1}
    shapes = [{"type": "line", "x0": k, "x1": k, "y0": 0, "y1": 1, "line": line} for k in range(len(axes) + 1)]
    made = figure(
        traces,
        annotations=notes,
        shapes=shapes,
        xaxis={"visible": False, "range": [-0.22, len(axes) + 0.3], "fixedrange": True},
        yaxis={"visible": False, "range": [-0.2 if lacking else -0.05, 1.14], "fixedrange": True},
        margin={"l": 6, "r": 6, "t": 4, "b": 4},
        hovermode="closest",
    )
    label = "Parallel coordinates: each trial's searched leaves and its goal"
    chart = Chart(made, "", label, 380, least_width=_PER_AXIS * (len(axes) + 1))
    lead = "Brighter is better, the thick line is the winner. Trials that were stopped are drawn at their last value."
    return Panel("parallel", "All trials at once", lead, (Charts((chart,), wide=True),))


class _Axis:
    """One leaf's axis: where a trial crosses it, from 0 to 1, and its ticks."""

    def __init__(self, frame: SweepFrame, cases: list[TrialCase], path: str) -> None:
        self._path, self._name = path, frame.short.get(path, path)
        values = [case.record.params[path] for case in cases if path in case.record.params]
        self._log = is_log(frame, path)
        self._numeric = is_numeric(frame, path)
        self._listed = sorted({repr(v): v for v in values}.values(), key=_order if self._numeric else str)
        self.some_lack = len(values) < len(cases)

    def place(self, case: TrialCase) -> float:
        return _MISSING if self._path not in case.record.params else self._at(case.record.params[self._path])

    def _at(self, value: Any) -> float:
        if not self._numeric:
            return [repr(v) for v in self._listed].index(repr(value)) / max(1, len(self._listed) - 1)
        low, high = float(self._listed[0]), float(self._listed[-1])
        if self._log:
            return math.log(value / low) / math.log(high / low)
        return (value - low) / (high - low)

    def notes(self, k: int) -> list[dict[str, Any]]:
        few = self._listed if len(self._listed) <= 7 else [self._listed[0], self._listed[-1]]
        ticks = [_note(k, self._at(value), plain(show(value)), "left") for value in few]
        ticks.append(_note(k, 1.06, f"<b>{plain(self._name)}</b>", "center", "bottom", 0))
        return [*ticks, _note(k, _MISSING, "not searched", "left")] if self.some_lack else ticks


def _order(value: Any) -> float:
    return float(value)


def _goal_notes(frame: SweepFrame, k: int, low: float, high: float) -> list[dict[str, Any]]:
    ends = [_note(k, 0.0, show(low), "left"), _note(k, 1.0, show(high), "left")]
    return [*ends, _note(k, 1.06, f"<b>{plain(frame.goal.metric.removeprefix('eval_'))}</b>", "center", "bottom", 0)]


def _note(x: float, y: float, text: str, anchor: str, up: str = "middle", shift: int = 5) -> dict[str, Any]:
    return {
        "x": x,
        "y": y,
        "text": text,
        "showarrow": False,
        "xanchor": anchor,
        "yanchor": up,
        "xshift": shift,
        "font": {"size": 11},
        "bgcolor": PAPER,
        "borderpad": 1,
    }


def _lines(frame: SweepFrame, level: int, rows: list[tuple[TrialCase, list[float]]], width: float = 1.6) -> Any:
    x: list[float | None] = []
    y: list[float | None] = []
    told: list[str | None] = []
    for case, places in rows:
        x += [*range(len(places)), None]
        y += [*places, None]
        words = f"trial {plain(case.label)}, {case.end_word.lower()}: {show(frame.value(case))}"
        told += [*([f"{words}<br>{plain(frame.words(case))}"] * len(places)), None]
    red, green, blue = shade(_DARKEST + (1 - _DARKEST) * level / (_SHADES - 1))
    line = {"color": f"rgba({red},{green},{blue},{1.0 if width > 2 else 0.85})", "width": width}
    return go.Scatter(x=x, y=y, text=told, mode="lines", line=line, hovertemplate="%{text}<extra></extra>")


def front_panel(seen: Insight) -> Panel | None:
    """The front as a table, and drawn for each further goal against the first one."""
    frame = seen.frame
    if not frame.also or not frame.front:
        return None
    charts = tuple(_chart(frame, other) for other in frame.also)
    goals = (frame.goal, *frame.also)
    head = ("trial", *(frame.short.get(p, p) for p in frame.paths), *(f"{g.metric} ({g.direction})" for g in goals))
    rows = tuple(
        (c.label, *(show(c.record.params.get(p)) for p in frame.paths), *(brief(c.last(g.metric)) for g in goals))
        for c in frame.front
    )
    table = Table(head, rows, frozenset(range(1, len(head))), marked=frozenset({0}))
    lead = "No trial is better than these in one goal without being worse in another. The first goal picks the winner."
    blocks: list[Block] = [Charts(charts, ((VERMILION, "the front"),)), table]
    return Panel("front", "The Pareto front", lead, blocks)


def _chart(frame: SweepFrame, other: Goal) -> Chart:
    shown = [case for case in frame.ranked if case.last(other.metric) is not None]
    best = sorted(frame.front, key=lambda case: case.last(frame.goal.metric) or math.inf)
    inside = {case.number for case in best}
    line = _dots(frame, best, other, "lines+markers", VERMILION, 9)
    rest = [case for case in shown if case.number not in inside]
    made = figure(
        [_dots(frame, rest, other, "markers", None, 7), line],
        xaxis={"title": {"text": plain(frame.goal.metric)}, "zeroline": False},
        yaxis={"title": {"text": plain(other.metric)}, "zeroline": False},
        margin={"l": 62, "r": 12, "t": 6, "b": 46},
    )
    return Chart(made, "", f"{other.metric} against {frame.goal.metric} of every complete trial", 340)


def _dots(frame: SweepFrame, cases: list[TrialCase], other: Goal, mode: str, colour: str | None, size: int) -> Any:
    return go.Scatter(
        x=[case.last(frame.goal.metric) for case in cases],
        y=[case.last(other.metric) for case in cases],
        mode=mode,
        line={"color": colour or FAINT, "width": 1.5, "dash": "dot"},
        marker={"size": size, "color": colour or [end_of(case)[0] for case in cases]},
        text=[f"trial {plain(case.label)}<br>{plain(frame.words(case))}" for case in cases],
        hovertemplate="%{text}<br>%{x:.4g}, %{y:.4g}<extra></extra>",
    )
