"""Learning curves: the best few in colour, the rest faint."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from dashboards.analysis.sweep_frame import SweepFrame, TrialCase
from dashboards.diagnosis.diagnose import Insight
from dashboards.report.blocks import Block, Chart, Charts, Panel, Words
from dashboards.report.figures import FAINT, RANKS, figure, plain, thin
from trainer.metrics import EVAL

_CHARTS = (
    (f"{EVAL}margins/logp", "Margin per token, held out"),
    (f"{EVAL}accuracies/logp", "Accuracy, held out"),
    (f"{EVAL}loss", "Loss, held out"),
    ("loss", "Loss, training"),
    ("grad_norm", "Gradient norm"),
)
_CHOSEN, _REJECTED = f"{EVAL}logps_per_token/chosen", f"{EVAL}logps_per_token/rejected"
_BUDGET = 24_000
"""Points of all faint curves of one chart together: with more of them each gets fewer."""
_BRIGHT = 200


def panel(seen: Insight) -> Panel | None:
    """One chart a metric; chosen and rejected log-probs share theirs."""
    frame = seen.frame
    bright = _bright(frame)
    charts = [_chart(frame, bright, [(metric, "solid")], title) for metric, title in _goal_first(frame)]
    both = _chart(
        frame, bright, [(_CHOSEN, "solid"), (_REJECTED, "dash")], "Log-prob per token: chosen —, rejected - -"
    )
    shown = [chart for chart in (charts[0], both, *charts[1:]) if chart is not None]
    if not shown:
        return None
    names = {case.number: f"trial {case.label}" for case in bright}
    legend = tuple((RANKS[k], f"{names[case.number]}: {frame.words(case)}") for k, case in enumerate(bright))
    blocks: list[Block] = [Charts(tuple(shown), legend)]
    most = _points_each(len(frame.trials))
    if any(len(course) > most for case in frame.trials for course in case.view.courses.values()):
        blocks.append(Words(f"Long curves are drawn with at most {_BRIGHT} points, faint ones with {most}."))
    rest = " The rest of the trials are grey." if len(frame.trials) > len(bright) else ""
    lead = f"Step 0 is the start model.{rest} Losses are not comparable across beta, gamma and objectives."
    return Panel("curves", "Learning curves", lead, blocks)


def _goal_first(frame: SweepFrame) -> list[tuple[str, str]]:
    if any(metric == frame.goal.metric for metric, _ in _CHARTS):
        return sorted(_CHARTS, key=lambda row: row[0] != frame.goal.metric)
    return [(frame.goal.metric, f"{frame.goal.metric}: the goal"), *_CHARTS]


def _bright(frame: SweepFrame) -> list[TrialCase]:
    """The best few; before any is complete, the first ones that run."""
    chosen = frame.ranked or [case for case in frame.trials if case.view.courses]
    return chosen[: len(RANKS)]


def _points_each(trials: int) -> int:
    return max(20, min(_BRIGHT, _BUDGET // max(1, trials)))


def _chart(frame: SweepFrame, bright: Sequence[TrialCase], metrics: list[tuple[str, str]], title: str) -> Chart | None:
    numbers = {case.number for case in bright}
    faint = [case for case in frame.trials if case.number not in numbers]
    traces: list[Any] = []
    for metric, dash in metrics:
        traces += _faint(faint, metric, dash)
    for k, case in reversed(list(enumerate(bright))):
        for metric, dash in metrics:
            course = thin(_finite(case, metric), _BRIGHT)
            if course:
                traces.append(_line(course, RANKS[k], dash, f"trial {case.label}", 2.4 if k == 0 else 1.7))
    if not traces:
        return None
    layout = figure(
        traces,
        xaxis={"title": {"text": "update"}, "rangemode": "tozero"},
        yaxis={"zeroline": False},
        margin={"l": 50, "r": 12, "t": 6, "b": 40},
        hovermode="closest",
    )
    return Chart(layout, title, f"{title}, by update, for each trial", height=270)


def _finite(case: TrialCase, metric: str) -> list[tuple[int, float]]:
    return [(step, value) for step, value in case.view.courses.get(metric, []) if math.isfinite(value)]


def _faint(cases: Sequence[TrialCase], metric: str, dash: str) -> list[Any]:
    """All of them as one trace, with gaps between: a page of 200 trials stays quick."""
    most = _points_each(len(cases))
    x: list[int | None] = []
    y: list[float | None] = []
    told: list[str | None] = []
    for case in cases:
        course = thin(_finite(case, metric), most)
        x += [*(step for step, _ in course), None]
        y += [*(value for _, value in course), None]
        told += [*([case.label] * len(course)), None]
    if not any(value is not None for value in y):
        return []
    line = {"color": FAINT, "width": 1, "dash": dash}
    template = "trial %{text}<br>update %{x}: %{y:.4g}<extra></extra>"
    return [go.Scatter(x=x, y=y, text=told, mode="lines", line=line, hovertemplate=template)]


def _line(course: Sequence[tuple[int, float]], colour: str, dash: str, name: str, width: float) -> Any:
    return go.Scatter(
        x=[step for step, _ in course],
        y=[value for _, value in course],
        mode="lines+markers" if len(course) <= 15 else "lines",
        line={"color": colour, "width": width, "dash": dash},
        marker={"size": 4, "color": colour},
        name=plain(name),
        hovertemplate=f"{plain(name)}<br>update %{{x}}: %{{y:.4g}}<extra></extra>",
    )
