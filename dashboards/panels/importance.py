"""What matters: how much of the goal's spread each leaf explains, and the goal along each leaf."""

from __future__ import annotations

import math
from typing import Any

import plotly.graph_objects as go

from dashboards.blocks import Block, Chart, Charts, Panel
from dashboards.effects import is_log, is_numeric, levels
from dashboards.figures import BLUE, GREY, VERMILION, end_of, figure, plain
from dashboards.frame import show
from dashboards.insight import Insight
from dashboards.sweep_frame import SweepFrame
from trainer.metrics import EVAL


def panel(seen: Insight) -> Panel | None:
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
