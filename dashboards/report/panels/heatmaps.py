"""Which region works: the goal over two leaves, one map for each value of a third (for SimPO beta x gamma by rate).

A map of cells: the best complete trial of each combination, and the marks of those that did not get there.

Every trial as a point over two leaves, for leaves that were drawn from ranges.
"""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go

from dashboards.analysis.param_effects import SEED, is_log, is_numeric, values_of
from dashboards.analysis.sweep_frame import SweepFrame, TrialCase, show
from dashboards.diagnosis.diagnose import Insight
from dashboards.report.blocks import Chart, Charts, Panel
from dashboards.report.figures import ENDS, GREY, colour_scale, end_of, figure, ink_on, plain, shade

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


def points(frame: SweepFrame, x: str, y: str, span: tuple[float, float]) -> Chart:
    """Colour is the goal, shape how the trial ended."""
    shown = [case for case in frame.trials if x in case.record.params and y in case.record.params]
    best = frame.ranked[0] if frame.ranked else None
    known = [case for case in shown if frame.value(case) is not None]
    traces: list[Any] = []
    for cases, coloured in ((known, True), ([c for c in shown if c not in known], False)):
        if cases:
            traces.append(_scatter(frame, cases, x, y, span, best, coloured))
    axes = [
        {
            "title": {"text": plain(frame.short.get(p, p))},
            **({"type": "log"} if is_log(frame, p) else {} if is_numeric(frame, p) else {"type": "category"}),
        }
        for p in (x, y)
    ]
    made = figure(traces, xaxis=axes[0], yaxis=axes[1], margin={"l": 62, "r": 10, "t": 8, "b": 46})
    return Chart(made, "", f"{frame.goal.metric} of every trial over {x} and {y}", height=420)


def _scatter(
    frame: SweepFrame,
    cases: list[TrialCase],
    x: str,
    y: str,
    span: tuple[float, float],
    best: TrialCase | None,
    coloured: bool,
) -> Any:
    marker: dict[str, Any] = {
        "size": [18 if case is best else 11 for case in cases],
        "symbol": ["star" if case is best else end_of(case)[1] for case in cases],
        "line": {"width": 1, "color": GREY},
    }
    if coloured:
        marker |= {"color": [frame.value(c) for c in cases], "colorscale": colour_scale(frame.sign)}
        marker |= {"cmin": span[0], "cmax": span[1], "showscale": True}
        marker |= {"colorbar": {"thickness": 10, "outlinewidth": 0, "len": 0.9}}
    else:
        marker["color"] = GREY
    return go.Scatter(
        x=[case.record.params[x] for case in cases],
        y=[case.record.params[y] for case in cases],
        mode="markers",
        marker=marker,
        text=[told(frame, [case]) + f"<br>{plain(frame.words(case))}" for case in cases],
        hovertemplate="%{text}<extra></extra>",
    )


_MOST_VALUES = 14
_MOST_MAPS = 9
_GAMMAS = ("loss.gamma", "loss.gamma_beta_ratio")
_RATE = "training.learning_rate"


def panel(seen: Insight) -> Panel | None:
    """A map of cells where the leaves have few values, of points where they were drawn from ranges."""
    frame = seen.frame
    leaves = plane(seen)
    if len(leaves) < 1 or len(frame.trials) < 2:
        return None
    values = [value for case in frame.trials if (value := frame.value(case)) is not None]
    span = (min(values), max(values)) if values else (0.0, 1.0)
    names = [frame.short.get(leaf, leaf) for leaf in leaves]
    lead = f"{frame.goal.metric} of the best complete trial; brighter is better.{_legend(frame)}"
    if len(leaves) == 1:
        return Panel("map", f"Which {names[0]} works", lead, (Charts((cells(frame, leaves[0], None, None, span),)),))
    if any(len(values_of(frame, leaf)) > _MOST_VALUES for leaf in leaves[:2]):
        chart = points(frame, leaves[0], leaves[1], span)
        lead = f"{frame.goal.metric} of every trial; brighter is better.{_legend(frame)}"
        return Panel("map", f"Which {names[1]} and {names[0]} work", lead, (Charts((chart,), wide=True),))
    if len(leaves) == 2:
        maps = [cells(frame, leaves[0], leaves[1], None, span)]
    else:
        shown = values_of(frame, leaves[2])[:_MOST_MAPS]
        maps = [cells(frame, leaves[0], leaves[1], (leaves[2], value), span) for value in shown]
    return Panel("map", f"Which {names[1]} and {names[0]} work", lead, (Charts(tuple(maps)),))


def _legend(frame: SweepFrame) -> str:
    """The marks that are there to be seen."""
    marks = [mark for word, mark in MARKS.items() if any(case.end_word == word for case in frame.trials)]
    return f" {', '.join(marks)}." if marks else ""


def plane(seen: Insight) -> tuple[str, ...]:
    """x, y and the leaf by which maps are split: beta, gamma and the rate where searched, else the most important."""
    frame = seen.frame
    varied = [p for p in frame.paths if p != SEED and len(values_of(frame, p)) > 1]
    gamma = next((p for p in _GAMMAS if p in varied), None)
    if gamma is not None and "loss.beta" in varied:
        first = [gamma, "loss.beta", *([_RATE] if _RATE in varied else [])]
    else:
        first = []
    weight = seen.importances
    rest = sorted(varied, key=lambda p: (not is_numeric(frame, p), -weight.get(p, 0.0), varied.index(p)))
    chosen = list(dict.fromkeys([*first, *rest]))[:3]
    if len(chosen) > 2 and len(values_of(frame, chosen[2])) > _MOST_MAPS:
        chosen = chosen[:2]
    return tuple(chosen)
