"""Every trial as a point over two leaves, for leaves that were drawn from ranges."""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go

from dashboards.blocks import Chart
from dashboards.cells import told
from dashboards.effects import is_log, is_numeric
from dashboards.figures import GREY, colour_scale, end_of, figure, plain
from dashboards.sweep_frame import SweepFrame, TrialCase


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
