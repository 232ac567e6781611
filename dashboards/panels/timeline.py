"""Who ran when, on which slot, and why it stopped."""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go

from dashboards.blocks import Chart, Charts, Panel
from dashboards.figures import BLUE, GOLD, GREEN, GREY, PINK, VERMILION, figure, plain
from dashboards.insight import Insight
from dashboards.spans import Span, idle_gaps, spans
from dashboards.sparks import duration
from dashboards.sweep_frame import SweepFrame
from orchestrator.study.state import TrialState

_COLOURS = {
    "complete": GREEN,
    "pruned": GOLD,
    "diverged": PINK,
    "failed": VERMILION,
    "running": BLUE,
}
_GAP = 0.08
"""Of the time in which anything ran: a longer pause is cut out."""


def panel(seen: Insight) -> Panel | None:
    """A bar an attempt; pauses of the whole sweep are cut out and marked."""
    frame = seen.frame
    found = spans(frame.events, _heard(frame))
    if not found or frame.sweeps:
        return None
    busy = _busy(found)
    gaps = idle_gaps(found, max(1.0, _GAP * busy))
    unit, size = ("hours", 3600.0) if busy > 2 * 3600 else ("minutes", 60.0) if busy > 120 else ("seconds", 1.0)
    begun = found[0].begun

    def at(moment: float) -> float:
        return (moment - begun - sum(end - start for start, end in gaps if end <= moment)) / size

    ends: dict[str, list[Span]] = {}
    for span in found:
        ends.setdefault(_end(frame, span), []).append(span)
    traces = [_bars(frame, name, rows, at) for name, rows in ends.items()]
    slots = max(span.slot for span in found) + 1
    pauses = [
        {"type": "line", "xref": "x", "yref": "paper", "x0": at(end), "x1": at(end), "y0": 0, "y1": 1}
        | {"line": {"color": GREY, "width": 1, "dash": "dot"}}
        for _, end in gaps
    ]
    notes = [
        {"x": at(end), "y": 1, "yref": "paper", "yanchor": "bottom", "showarrow": False, "font": {"size": 10}}
        | {"text": f"stopped {duration(end - start)}"}
        for start, end in gaps
    ]
    made = figure(
        traces,
        barmode="overlay",
        shapes=pauses,
        annotations=notes,
        xaxis={"title": {"text": f"{unit} in which the sweep ran"}, "zeroline": False},
        yaxis={
            "tickvals": list(range(slots)),
            "ticktext": [f"slot {k + 1}" for k in range(slots)],
            "autorange": "reversed",
            "fixedrange": True,
            "zeroline": False,
        },
        uniformtext={"mode": "hide", "minsize": 9},
        margin={"l": 54, "r": 12, "t": 24 if gaps else 6, "b": 44},
    )
    legend = tuple((_COLOURS.get(name, GREY), name) for name in ends)
    chart = Chart(made, "", "Timeline of trials by slot", 76 + 40 * slots, least_width=560 if len(found) > 20 else 0)
    lead = "The number is the trial's. Point at a bar for the reason it stopped."
    return Panel("timeline", "Who ran when", lead, (Charts((chart,), legend, wide=True),))


def _heard(frame: SweepFrame) -> float:
    """Until when trials run: now, or where nobody drives the sweep any more, when it was last heard of."""
    if frame.state in ("running", "paused"):
        return frame.at
    begun = [(case.record.started_at, case.record.seconds) for case in frame.in_state(TrialState.RUNNING)]
    heard = [event.at for event in frame.events] + [at + seconds for at, seconds in begun if at is not None]
    return max(heard, default=frame.at)


def _busy(found: list[Span]) -> float:
    total, until = 0.0, found[0].begun
    for span in found:
        total += max(0.0, span.ended - max(until, span.begun))
        until = max(until, span.ended)
    return total


def _end(frame: SweepFrame, span: Span) -> str:
    case = next((case for case in frame.trials if case.number == span.trial), None)
    if case is not None and case.record.diverged and span.end == "pruned":
        return "diverged"
    if span.end == "running" and frame.state not in ("running", "paused"):
        return "interrupted"
    return span.end if span.end in _COLOURS else "interrupted"


def _bars(frame: SweepFrame, name: str, rows: list[Span], at: Any) -> Any:
    by_number = {case.number: case for case in frame.trials}
    told: list[str] = []
    for span in rows:
        case = by_number.get(span.trial)
        words = "" if case is None else f"<br>{plain(frame.words(case))}"
        reason = f"<br>{plain(span.text[:160])}" if span.text else ""
        worker = f", worker {span.pid}" if span.pid else ""
        attempt = f", attempt {span.attempt}" if span.attempt > 1 else ""
        took = duration(span.ended - span.begun)
        told.append(f"trial {span.trial}{attempt}: {name} after {took}{worker}{words}{reason}")
    return go.Bar(
        base=[at(span.begun) for span in rows],
        x=[at(span.ended) - at(span.begun) for span in rows],
        y=[span.slot for span in rows],
        orientation="h",
        width=0.78,
        marker={"color": _COLOURS.get(name, GREY), "line": {"width": 1, "color": "rgba(255,255,255,0.7)"}},
        text=[str(span.trial) for span in rows],
        textposition="inside",
        insidetextanchor="middle",
        customdata=told,
        hovertemplate="%{customdata}<extra></extra>",
    )
