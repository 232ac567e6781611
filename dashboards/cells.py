"""A map of cells: the best complete trial of each combination, and the marks of those that did not get there."""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go

from dashboards.blocks import Chart
from dashboards.effects import values_of
from dashboards.figures import ENDS, GREY, colour_scale, figure, ink_on, plain, shade
from dashboards.frame import show
from dashboards.sweep_frame import SweepFrame, TrialCase

MARKS = {"PRUNED": "▼ pruned", "DIVERGED": "✕ diverged", "FAILED": "■ failed", "RUNNING": "◆ running"}


def cells(frame: SweepFrame, x: str, y: str | None, facet: tuple[str, Any] | None, span: tuple[float, float]) -> Chart:
    """One map; `facet`: a third leaf and its value; `span`: lowest and highest value of the goal."""
    columns = values_of(frame, x)
    rows: list[Any] = [None] if y is None else values_of(frame, y)
    z: list[list[float | None]] = []
    hover: list[list[str]] = []
    notes: list[dict[str, Any]] = []
    for r, row in enumerate(rows):
        z.append([])
        hover.append([])
        for c, column in enumerate(columns):
            inside = [case for case in frame.trials if _is_at(case, [(x, column), *([(y, row)] if y else [])], facet)]
            numbers = {case.number for case in inside}
            best = next((case for case in frame.ranked if case.number in numbers), None)
            value = None if best is None else best.record.value
            z[-1].append(value)
            hover[-1].append(told(frame, inside) or "not tried")
            text, ink = _word(frame, inside, best, span)
            if text:
                notes.append({"x": c, "y": r, "text": text, "showarrow": False, "font": {"size": 11, "color": ink}})
    low, high = span
    trace = go.Heatmap(
        z=z,
        x=list(range(len(columns))),
        y=list(range(len(rows))),
        text=hover,
        hovertemplate="%{text}<extra></extra>",
        colorscale=colour_scale(frame.sign),
        zmin=low,
        zmax=high if high > low else low + 1e-9,
        showscale=False,
        xgap=3,
        ygap=3,
    )
    # Cells without a complete trial get a frame of their own, so that they are seen as cells.
    empty = [
        {
            "type": "rect",
            "x0": c - 0.47,
            "x1": c + 0.47,
            "y0": r - 0.46,
            "y1": r + 0.46,
            "line": {"color": GREY, "width": 1, "dash": "dot"},
        }
        for r, line in enumerate(z)
        for c, value in enumerate(line)
        if value is None
    ]
    layout = figure(
        [trace],
        annotations=notes,
        shapes=empty,
        xaxis=_axis(frame, x, columns),
        yaxis={"visible": False} if y is None else _axis(frame, y, rows),
        margin={"l": 24 if y is None else 64, "r": 10, "t": 8, "b": 44},
    )
    title = "" if facet is None else f"{frame.short.get(facet[0], facet[0])} {show(facet[1])}"
    label = f"Heatmap of {frame.goal.metric} over {x}" + (f" and {y}" if y else "") + (f", {title}" if title else "")
    return Chart(layout, title, label, height=92 + max(1, len(rows)) * 54, least_width=110 + 64 * len(columns))


def _axis(frame: SweepFrame, path: str, values: list[Any]) -> dict[str, Any]:
    return {
        "title": {"text": plain(frame.short.get(path, path))},
        "tickvals": list(range(len(values))),
        "ticktext": [plain(show(value)) for value in values],
        "showgrid": False,
        "zeroline": False,
        "range": [-0.5, len(values) - 0.5],
        "fixedrange": True,
    }


def _is_at(case: TrialCase, places: list[tuple[str, Any]], facet: tuple[str, Any] | None) -> bool:
    wanted = [*places, *([facet] if facet else [])]
    return all(p in case.record.params and repr(case.record.params[p]) == repr(v) for p, v in wanted)


def _word(
    frame: SweepFrame, inside: list[TrialCase], best: TrialCase | None, span: tuple[float, float]
) -> tuple[str, str]:
    marks = dict.fromkeys(MARKS[case.end_word] for case in inside if case.end_word in MARKS)
    if best is None or best.record.value is None:
        ends = [case.end_word for case in inside if case.end_word in MARKS]
        return "<br>".join(marks), ENDS[ends[0]][0] if ends else GREY
    low, high = span
    share = (best.record.value - low) / (high - low) if high > low else 0.5
    star = "★ " if frame.ranked[0] is best else ""
    others = " " + "".join(mark[0] for mark in marks) if marks else ""
    return f"{star}{show(best.record.value)}{others}", ink_on(shade(share if frame.sign > 0 else 1 - share))


def told(frame: SweepFrame, inside: list[TrialCase]) -> str:
    """What a finger or a mouse is told of these trials."""
    lines = [
        f"trial {case.label}: {case.end_word.lower()}, {show(frame.value(case))}"
        + (f"<br>  {plain(case.record.reason[:90])}" if case.record.reason else "")
        for case in inside
    ]
    return "<br>".join(lines[:8]) + (f"<br>and {len(lines) - 8} more" if len(lines) > 8 else "")
