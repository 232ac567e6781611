"""The collapse map: did the margin grow by raising the chosen responses, or only by burying the rejected ones?"""

from __future__ import annotations

import math
from typing import Any

import plotly.graph_objects as go

from dashboards.blocks import Chart, Charts, Panel
from dashboards.diagnosis.health import CHOSEN, CHOSEN_DROP, MARGIN
from dashboards.figures import FAINT, GREEN, GREY, RANKS, VERMILION, end_of, figure, plain
from dashboards.frame import show
from dashboards.insight import Insight
from dashboards.sweep_frame import SweepFrame, TrialCase


def panel(seen: Insight) -> Panel | None:
    """Change of the margin against change of the chosen log-prob, both per token and since the start model."""
    frame = seen.frame
    placed = [
        (case, chosen, margin)
        for case in frame.trials
        if (chosen := case.change(CHOSEN)) is not None and (margin := case.change(MARGIN)) is not None
    ]
    if not placed:
        return None
    ranks = {case.number: k for k, case in enumerate(frame.ranked[: len(RANKS)])}
    traces: list[Any] = [_path(case, RANKS[ranks[case.number]]) for case, _, _ in placed if case.number in ranks]
    traces.append(_marks(frame, placed, ranks))
    ends = [0.0, *(y for case, _, _ in placed for y in _margins(case))]
    room = 0.12 * (max(ends) - min(ends)) or 0.1
    bottom, top = min(ends) - room, max(ends) + room
    low = min(0.0, *(x for _, x, _ in placed)) - 0.02
    notes = [
        _note("hollow: chosen falls too", VERMILION, 0.01, 0.99, "left"),
        _note("healthy", GREEN, 0.99, 0.99, "right"),
    ]
    zero = {"type": "line", "line": {"color": GREY, "width": 1, "dash": "dot"}}
    edge = {"type": "line", "line": {"color": VERMILION, "width": 1, "dash": "dash"}}
    shapes: list[dict[str, Any]] = [
        {**zero, "xref": "x", "yref": "paper", "x0": 0, "x1": 0, "y0": 0, "y1": 1},
        {**zero, "xref": "paper", "yref": "y", "x0": 0, "x1": 1, "y0": 0, "y1": 0},
    ]
    if low < -CHOSEN_DROP:
        shapes.append({**edge, "xref": "x", "yref": "paper", "x0": -CHOSEN_DROP, "x1": -CHOSEN_DROP, "y0": 0, "y1": 1})
    made = figure(
        traces,
        annotations=notes,
        shapes=shapes,
        xaxis={"title": {"text": "change of the chosen log-prob per token"}, "zeroline": False},
        yaxis={"title": {"text": "change of the margin per token"}, "zeroline": False, "range": [bottom, top]},
        margin={"l": 62, "r": 14, "t": 26, "b": 46},
    )
    lead = (
        "The margin can grow although the chosen responses become less likely: then the model has learned what not to "
        "say. The start model is at the origin; lines show how the best trials went, in the colours of the curves."
    )
    label = "Change of the margin against change of the chosen log-prob of each trial"
    return Panel("collapse", "Healthy or hollow", lead, (Charts((Chart(made, "", label, 400),), wide=True),))


def _margins(case: TrialCase) -> list[float]:
    values = [value for _, value in case.view.courses.get(MARGIN, []) if math.isfinite(value)]
    return [value - values[0] for value in values]


def _path(case: TrialCase, colour: str) -> Any:
    chosen, margin = dict(case.view.courses.get(CHOSEN, [])), dict(case.view.courses.get(MARGIN, []))
    steps = sorted(chosen.keys() & margin.keys())
    return go.Scatter(
        x=[chosen[step] - chosen[steps[0]] for step in steps],
        y=[margin[step] - margin[steps[0]] for step in steps],
        mode="lines",
        line={"color": colour, "width": 1.4},
        hoverinfo="skip",
    )


def _marks(frame: SweepFrame, placed: list[tuple[TrialCase, float, float]], ranks: dict[int, int]) -> Any:
    cases = [case for case, _, _ in placed]
    return go.Scatter(
        x=[x for _, x, _ in placed],
        y=[y for _, _, y in placed],
        mode="markers+text" if len(placed) <= 30 else "markers",
        text=[plain(case.label) for case in cases],
        textposition=_beside([(x, y) for _, x, y in placed]),
        marker={
            "size": [13 if ranks.get(case.number) == 0 else 9 for case in cases],
            "symbol": ["star" if ranks.get(case.number) == 0 else end_of(case)[1] for case in cases],
            "color": [RANKS[ranks[case.number]] if case.number in ranks else end_of(case)[0] for case in cases],
            "line": {"width": 1, "color": FAINT},
        },
        customdata=[
            f"trial {plain(case.label)}, {case.end_word.lower()}<br>{plain(frame.words(case))}"
            f"<br>{plain(frame.goal.metric)} {show(frame.value(case))}"
            for case in cases
        ],
        hovertemplate="%{customdata}<br>chosen %{x:+.3g}, margin %{y:+.3g}<extra></extra>",
    )


def _beside(points: list[tuple[float, float]]) -> list[str]:
    """Where each number stands: above its mark, and to the right or below where another is close by."""
    wide = max(x for x, _ in points) - min(x for x, _ in points) or 1.0
    high = max(y for _, y in points) - min(y for _, y in points) or 1.0
    out: list[str] = []
    for k, (x, y) in enumerate(points):
        close = sum(abs(x - a) < 0.03 * wide and abs(y - b) < 0.2 * high for a, b in points[:k])
        out.append(("top center", "middle right", "bottom center", "middle left")[close % 4])
    return out


def _note(text: str, colour: str, x: float, y: float, anchor: str) -> dict[str, Any]:
    return {
        "text": text,
        "showarrow": False,
        "xref": "paper",
        "yref": "paper",
        "x": x,
        "y": y,
        "xanchor": anchor,
        "yanchor": "bottom",
        "font": {"color": colour, "size": 12},
    }
