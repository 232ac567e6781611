"""Panel of learning curves: the best trials in color, the others in gray."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from dashboards.analysis.sweep_frame import SweepFrame, TrialFrame
from dashboards.diagnosis.diagnose import SweepAnalysis
from dashboards.report.blocks import Block, Chart, Charts, Panel, Paragraph
from dashboards.report.figures import FAINT_COLOR, RANK_COLORS, downsample, escape_text, figure
from trainer.metrics import CHOSEN, EVAL_PREFIX, MARGIN, REJECTED

_CHARTS = (
    (MARGIN, "Margin per token, held out"),
    (f"{EVAL_PREFIX}accuracies/logp", "Accuracy, held out"),
    (f"{EVAL_PREFIX}loss", "Loss, held out"),
    ("loss", "Loss, training"),
    ("grad_norm", "Gradient norm"),
)
_MAX_POINTS = 24_000
"""Points of all gray curves of one chart together, shared among the trials."""
_MAX_POINTS_HIGHLIGHTED = 200


def learning_curves_panel(analysis: SweepAnalysis) -> Panel | None:
    """Return one chart per metric; chosen and rejected log-probs share a chart."""
    frame = analysis.frame
    highlighted = _highlighted(frame)
    charts = [_chart(frame, highlighted, [(metric, "solid")], title) for metric, title in _objective_first(frame)]
    both = _chart(
        frame, highlighted, [(CHOSEN, "solid"), (REJECTED, "dash")], "Log-prob per token: chosen —, rejected - -"
    )
    shown = [chart for chart in (charts[0], both, *charts[1:]) if chart is not None]
    if not shown:
        return None
    names = {trial.number: f"trial {trial.label}" for trial in highlighted}
    legend = tuple(
        (RANK_COLORS[k], f"{names[trial.number]}: {frame.describe_params(trial)}")
        for k, trial in enumerate(highlighted)
    )
    blocks: list[Block] = [Charts(tuple(shown), legend)]
    most = _points_each(len(frame.trials))
    if any(len(curve) > most for trial in frame.trials for curve in trial.curves.curves.values()):
        blocks.append(
            Paragraph(f"Long curves are drawn with at most {_MAX_POINTS_HIGHLIGHTED} points, gray ones with {most}.")
        )
    rest = " All other trials are gray." if len(frame.trials) > len(highlighted) else ""
    lead = f"Step 0 is the initial model.{rest} Losses are not comparable across beta, gamma and loss kinds."
    return Panel("curves", "Learning curves", lead, blocks)


def _objective_first(frame: SweepFrame) -> list[tuple[str, str]]:
    if any(metric == frame.objective.metric for metric, _ in _CHARTS):
        return sorted(_CHARTS, key=lambda row: row[0] != frame.objective.metric)
    return [(frame.objective.metric, f"{frame.objective.metric}: the objective"), *_CHARTS]


def _highlighted(frame: SweepFrame) -> list[TrialFrame]:
    """Return the selected or the best trials; before any is complete, the first ones with curves."""
    chosen = frame.highlighted or [trial for trial in frame.trials if trial.curves.curves]
    return chosen[: len(RANK_COLORS)]


def _points_each(trials: int) -> int:
    return max(20, min(_MAX_POINTS_HIGHLIGHTED, _MAX_POINTS // max(1, trials)))


def _chart(
    frame: SweepFrame, highlighted: Sequence[TrialFrame], metrics: list[tuple[str, str]], title: str
) -> Chart | None:
    numbers = {trial.number for trial in highlighted}
    faint = [trial for trial in frame.trials if trial.number not in numbers]
    traces: list[Any] = []
    for metric, dash in metrics:
        traces += _background_trace(faint, metric, dash)
    for k, trial in reversed(list(enumerate(highlighted))):
        for metric, dash in metrics:
            curve = downsample(_finite(trial, metric), _MAX_POINTS_HIGHLIGHTED)
            if curve:
                traces.append(_line(curve, RANK_COLORS[k], dash, f"trial {trial.label}", 2.4 if k == 0 else 1.7))
    if not traces:
        return None
    layout = figure(
        traces,
        xaxis={"title": {"text": "update"}, "rangemode": "tozero"},
        yaxis={"zeroline": False, "automargin": True},  # values that differ little have long labels
        margin={"l": 50, "r": 12, "t": 6, "b": 40},
        hovermode="closest",
    )
    return Chart(layout, title, f"{title}, by update, for each trial", height=270)


def _finite(trial: TrialFrame, metric: str) -> list[tuple[int, float]]:
    return [(step, value) for step, value in trial.curves.curves.get(metric, []) if math.isfinite(value)]


def _background_trace(trials: Sequence[TrialFrame], metric: str, dash: str) -> list[Any]:
    """Draw all trials as one trace with gaps, as one trace per trial makes a page of 200 trials slow."""
    most = _points_each(len(trials))
    x: list[int | None] = []
    y: list[float | None] = []
    texts: list[str | None] = []
    for trial in trials:
        curve = downsample(_finite(trial, metric), most)
        x += [*(step for step, _ in curve), None]
        y += [*(value for _, value in curve), None]
        texts += [*([trial.label] * len(curve)), None]
    if not any(value is not None for value in y):
        return []
    line = {"color": FAINT_COLOR, "width": 1, "dash": dash}
    template = "trial %{text}<br>update %{x}: %{y:.4g}<extra></extra>"
    trace = go.Scatter(mode="lines", line=line, hovertemplate=template)
    return [trace.to_plotly_json() | {"x": x, "y": y, "text": texts}]


def _line(curve: Sequence[tuple[int, float]], color: str, dash: str, name: str, width: float) -> Any:
    return go.Scatter(
        x=[step for step, _ in curve],
        y=[value for _, value in curve],
        mode="lines+markers" if len(curve) <= 15 else "lines",
        line={"color": color, "width": width, "dash": dash},
        marker={"size": 4, "color": color},
        name=escape_text(name),
        hovertemplate=f"{escape_text(name)}<br>update %{{x}}: %{{y:.4g}}<extra></extra>",
    )
