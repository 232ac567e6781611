"""Parallel coordinates, drawn as lines: they print, need no WebGL, and a finger can point at one."""

from __future__ import annotations

import math
from typing import Any

import plotly.graph_objects as go

from dashboards.blocks import Chart, Charts, Panel
from dashboards.effects import is_log, is_numeric
from dashboards.figures import GREY, PAPER, figure, plain, shade
from dashboards.frame import show
from dashboards.insight import Insight
from dashboards.sweep_frame import SweepFrame, TrialCase

_SHADES = 12
_DARKEST = 0.35
"""Of the scale of colours: a thin line below this is lost on a dark page."""
_PER_AXIS = 120
_MISSING = -0.12


def panel(seen: Insight) -> Panel | None:
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
