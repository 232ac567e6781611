"""Panel of gain against distance: the objective of each complete trial over how far it went from the initial model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from dashboards.analysis.distance import Distances, find_distances, log_ratio
from dashboards.analysis.sweep_frame import SweepFrame, TrialFrame
from dashboards.diagnosis.diagnose import SweepAnalysis
from dashboards.formatting import format_changes, format_measured, format_settings, format_value
from dashboards.report.blocks import Block, Chart, Charts, Panel, Table
from dashboards.report.figures import BLUE, FAINT_COLOR, GREEN, GREY, VERMILION, escape_text, figure
from trainer.metrics import EVAL_PREFIX, EXACT_ANSWERS, KL, LOG_RATIO_CHOSEN, LOG_RATIO_REJECTED

_MIN_TRIALS = 2
_LEAD = (
    "For one gain, the trial closer to the initial model is the safer one: far from it a held-out accuracy says less "
    "about the answers."
)
_FRONT = " No trial that can be the best is both closer and better than one on the front."
_MEASURES = {
    KL: "KL per token",
    LOG_RATIO_CHOSEN: "log-ratio, chosen",
    LOG_RATIO_REJECTED: "log-ratio, rejected",
}
"""Metric -> column of the table."""


def distance_panel(analysis: SweepAnalysis) -> Panel | None:
    """Return a scatter plot of objective against distance, with the non-dominated trials marked, and their table.

    None for fewer than two complete trials with a distance.
    """
    frame, found = analysis.frame, find_distances(analysis.frame)
    if found is None or len(found.by_trial) < _MIN_TRIALS:
        return None
    legend = [(VERMILION, "front"), (GREEN, "other complete trials"), (BLUE, "initial model")]
    if any(not trial.record.keeps_requirements for trial in frame.ranked if trial.number in found.by_trial):
        legend.append((GREY, "breaks a requirement"))
    label = f"{frame.objective.metric} against the distance from the initial model of every complete trial"
    chart = Chart(_scatter(frame, found), "", label, 360)
    blocks: list[Block] = [Charts((chart,), tuple(legend), wide=True)]
    if found.front:
        blocks.append(_front_table(frame, found.front))
    return Panel("distance", "Gain against distance", _LEAD + (_FRONT if found.front else ""), blocks)


def _scatter(frame: SweepFrame, found: Distances) -> dict[str, Any]:
    on_front = {trial.number for trial in found.front}
    shown = [trial for trial in frame.ranked if trial.number in found.by_trial and frame.value(trial) is not None]
    rest = [trial for trial in shown if trial.number not in on_front]
    kept = [trial for trial in rest if trial.record.keeps_requirements]
    broken = [trial for trial in rest if not trial.record.keeps_requirements]
    traces = [
        _dots(frame, found, broken, "markers", GREY, "x"),
        _dots(frame, found, kept, "markers", GREEN, "circle"),
        _dots(frame, found, found.front, "lines+markers+text", VERMILION, "circle"),
    ]
    start = frame.initial_value(frame.objective.metric)
    if start is not None:
        marker = {"size": 10, "color": BLUE, "symbol": "diamond"}
        hover = "initial model<br>%{y:.4g}<extra></extra>"
        traces.append(go.Scatter(x=[0.0], y=[start], mode="markers", marker=marker, hovertemplate=hover))
    return figure(
        traces,
        xaxis={"title": {"text": f"{found.name}, nats"}, "zeroline": False, "rangemode": "tozero"},
        yaxis={"title": {"text": escape_text(frame.objective.metric)}, "zeroline": False},
        margin={"l": 62, "r": 14, "t": 16, "b": 46},
    )


def _dots(frame: SweepFrame, found: Distances, trials: Sequence[TrialFrame], mode: str, color: str, symbol: str) -> Any:
    best = frame.eligible[0].number if frame.eligible else None
    return go.Scatter(
        x=[found.by_trial[trial.number] for trial in trials],
        y=[frame.value(trial) for trial in trials],
        mode=mode,
        line={"color": color, "width": 1.5, "dash": "dot"},
        marker={
            "size": [13 if trial.number == best else 8 for trial in trials],
            "symbol": ["star" if trial.number == best else symbol for trial in trials],
            "color": color,
            "line": {"width": 1, "color": FAINT_COLOR},
        },
        text=[escape_text(trial.label) for trial in trials],
        textposition="top center",
        customdata=[
            f"trial {escape_text(trial.label)}{'' if trial.record.keeps_requirements else ', breaks a requirement'}<br>"
            f"{escape_text(frame.describe_params(trial))}<br>{format_value(found.by_trial[trial.number])} nats"
            for trial in trials
        ],
        hovertemplate="%{customdata}<br>%{y:.4g}<extra></extra>",
    )


def _front_table(frame: SweepFrame, front: Sequence[TrialFrame]) -> Table:
    """Return the trials of the front, the closest first, with every measure of distance that they have."""
    measured = {metric: [_measured(trial, metric) for trial in front] for metric in _MEASURES}
    measured = {metric: values for metric, values in measured.items() if any(value is not None for value in values)}
    answers = any(trial.last(EXACT_ANSWERS) is not None for trial in front)
    head = ["trial", *(frame.short_names.get(path, path) for path in frame.paths)]
    head += [frame.objective.metric.removeprefix(EVAL_PREFIX), *(_MEASURES[metric] for metric in measured)]
    columns = [
        [trial.label for trial in front],
        *(format_settings([trial.record.params.get(path) for trial in front]) for path in frame.paths),
        format_measured([frame.value(trial) for trial in front]),
        *(format_measured(values, 3, signed=metric != KL) for metric, values in measured.items()),
    ]
    if answers:
        head.append("right answers")
        columns.append(
            format_changes(
                [trial.last(EXACT_ANSWERS) for trial in front], [trial.change(EXACT_ANSWERS) for trial in front]
            )
        )
    return Table(tuple(head), tuple(zip(*columns, strict=True)), frozenset(range(1, len(head))))


def _measured(trial: TrialFrame, metric: str) -> float | None:
    return trial.last(KL) if metric == KL else log_ratio(trial, metric)
