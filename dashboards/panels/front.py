"""Several goals: the trials that no other one beats in all of them."""

from __future__ import annotations

import math
from typing import Any

import plotly.graph_objects as go

from dashboards.blocks import Block, Chart, Charts, Panel, Table
from dashboards.figures import FAINT, VERMILION, end_of, figure, plain
from dashboards.frame import brief, show
from dashboards.insight import Insight
from dashboards.sweep_frame import SweepFrame, TrialCase
from orchestrator.spec.goal import Goal


def panel(seen: Insight) -> Panel | None:
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
