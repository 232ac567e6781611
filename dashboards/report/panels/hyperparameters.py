"""Panels of hyperparameters: importance, objective along each setting, parallel coordinates, Pareto front.

Parallel coordinates are drawn as line traces, as plotly's own trace type needs WebGL and does not print.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import plotly.graph_objects as go

from dashboards.analysis.param_effects import is_log, is_numeric_setting, levels
from dashboards.analysis.sweep_frame import SweepFrame, TrialFrame
from dashboards.diagnosis.diagnose import SweepAnalysis
from dashboards.formatting import format_measured, format_settings, format_value
from dashboards.report.blocks import Block, Chart, Charts, Panel, Table
from dashboards.report.figures import (
    BLUE,
    FAINT_COLOR,
    GREEN,
    GREY,
    PAPER,
    VERMILION,
    escape_text,
    figure,
    scale_color,
    state_marker,
)
from orchestrator.spec.objectives import Objective
from orchestrator.study.importance import MIN_PED_ANOVA_TRIALS
from trainer.metrics import EVAL_PREFIX


def importance_panel(analysis: SweepAnalysis) -> Panel | None:
    """Return the fANOVA and PED-ANOVA importances and a slice plot of each setting."""
    frame = analysis.frame
    slices = [_slice(frame, path) for path in frame.paths if len(levels(frame, path)) > 1]
    if not slices:
        return None
    blocks: list[Block] = []
    by_best = analysis.ped_anova
    bars = [
        _bars(frame, shares, name, color)
        for shares, name, color in (
            (analysis.importances, "fANOVA", BLUE),
            (by_best.shares, f"PED-ANOVA, best {by_best.best_share:.0%}", GREEN),
        )
        if shares
    ]
    if bars:
        blocks.append(Charts(tuple(bars), wide=len(bars) == 1))
    blocks.append(Charts(tuple(slices)))
    lead = "Each dot is a trial; the line joins the means of complete trials."
    if by_best.shares:
        lead = (
            f"PED-ANOVA, which Optuna recommends: which settings the best {by_best.best_share:.0%} of the trials have "
            f"in common, also those that only some trials have. {lead}"
        )
    elif by_best.trials < MIN_PED_ANOVA_TRIALS:
        lead = (
            f"PED-ANOVA, which Optuna recommends, needs {MIN_PED_ANOVA_TRIALS} complete trials; there are "
            f"{by_best.trials}. {lead}"
        )
    if analysis.importances:
        lead = (
            "fANOVA: share of the objective's variance that each setting explains among the complete trials (with a "
            f"random forest; a rough estimate with few trials). {lead}"
        )
    return Panel("importance", "Importance of settings", lead, blocks)


def _bars(frame: SweepFrame, importances: Mapping[str, float], name: str, color: str) -> Chart:
    shares = list(reversed(list(importances.items())))
    trace = go.Bar(
        x=[share for _, share in shares],
        y=[escape_text(frame.short_names.get(path, path)) for path, _ in shares],
        orientation="h",
        marker={"color": color},
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
    label = f"Importance of each searched setting by {name}"
    return Chart(layout, f"Importance ({name})", label, 70 + 34 * len(shares))


def _slice(frame: SweepFrame, path: str) -> Chart:
    best = frame.eligible[0] if frame.eligible else None
    trials = [trial for trial in frame.trials if path in trial.record.params and frame.value(trial) is not None]
    trials.sort(key=lambda trial: trial is best)  # drawn last, on top
    numeric, log = is_numeric_setting(frame, path), is_log(frame, path)

    def position(value: Any) -> Any:
        return value if numeric else escape_text(format_value(value))

    dots = go.Scatter(
        x=[position(trial.record.params[path]) for trial in trials],
        y=[frame.value(trial) for trial in trials],
        mode="markers",
        marker={
            "color": [VERMILION if trial is best else state_marker(trial)[0] for trial in trials],
            "symbol": ["star" if trial is best else state_marker(trial)[1] for trial in trials],
            "size": [13 if trial is best or trial.label in frame.selected else 7 for trial in trials],
            "opacity": 0.8,
            "line": {"width": [2.5 if trial.label in frame.selected else 0 for trial in trials], "color": VERMILION},
        },
        text=[
            f"trial {escape_text(trial.label)}, {trial.state_label.lower()}<br>"
            f"{escape_text(frame.describe_params(trial))}"
            for trial in trials
        ],
        hovertemplate="%{text}<br>%{y:.4g}<extra></extra>",
    )
    traces: list[Any] = [dots]
    found = levels(frame, path)
    if len(found) <= 12:
        means = go.Scatter(
            x=[position(level.value) for level in found],
            y=[level.mean for level in found],
            mode="lines",
            line={"color": GREY, "width": 1.5},
            hoverinfo="skip",
        )
        traces.insert(0, means)
    axis: dict[str, Any] = {"title": {"text": escape_text(path)}}
    if numeric:
        values = [level.value for level in found]
        axis |= {"type": "log"} if log else {}
        axis |= {"range": _padded_range([trial.record.params[path] for trial in trials], log)}
        if len(values) <= 6:
            axis |= {"tickvals": values, "ticktext": [format_value(value) for value in values]}
    else:
        axis |= {"type": "category"}
    made = figure(traces, xaxis=axis, yaxis={"zeroline": False}, margin={"l": 54, "r": 12, "t": 6, "b": 42})
    title = f"{frame.objective.metric.removeprefix(EVAL_PREFIX)} by {frame.short_names.get(path, path)}"
    return Chart(made, title, f"{frame.objective.metric} along {path}", 250)


def _padded_range(values: list[Any], log: bool) -> list[float]:
    """Return the axis range with padding at both ends; plotly's log axes use log10 of the values."""
    positions = [math.log10(value) if log else float(value) for value in values]
    padding = 0.08 * (max(positions) - min(positions)) or 0.5
    return [min(positions) - padding, max(positions) + padding]


_SHADE_COUNT = 12
_MIN_SHADE = 0.35
"""Share of the color scale. Darker thin lines are invisible on a dark page."""
_AXIS_WIDTH = 120
"""Pixels."""
_MISSING_POSITION = -0.12
"""Height on an axis (0 to 1) at which trials without the setting cross it."""


def parallel_panel(analysis: SweepAnalysis) -> Panel | None:
    """Return parallel coordinates: one axis per searched setting and one for the objective, one line per trial."""
    frame = analysis.frame
    shown = [trial for trial in frame.trials if frame.value(trial) is not None]
    paths = [
        p for p in frame.paths if len({repr(trial.record.params[p]) for trial in shown if p in trial.record.params}) > 1
    ]
    if len(shown) < 3 or len(paths) < 2:
        return None
    values = [value for trial in shown if (value := frame.value(trial)) is not None]
    low, high = min(values), max(values)
    axes = [_Axis(frame, shown, path) for path in paths]
    lines: dict[int, list[tuple[TrialFrame, list[float]]]] = {}
    for trial in shown:
        value = frame.value(trial)
        assert value is not None
        share = 0.5 if high == low else (value - low) / (high - low)
        level = round((share if frame.sign > 0 else 1 - share) * (_SHADE_COUNT - 1))
        lines.setdefault(level, []).append((trial, [*(axis.position(trial) for axis in axes), share]))
    traces: list[Any] = [_lines(frame, level, lines[level]) for level in sorted(lines)]
    if frame.eligible:
        best = next(row for rows in lines.values() for row in rows if row[0] is frame.eligible[0])
        traces.append(_lines(frame, _SHADE_COUNT - 1, [best], width=4.5))
    chosen = [row for rows in lines.values() for row in rows if row[0].label in frame.selected]
    if chosen:
        traces.append(_lines(frame, _SHADE_COUNT - 1, chosen, width=3.5, color=VERMILION))
    annotations = [annotation for k, axis in enumerate(axes) for annotation in axis.annotations(k)]
    annotations += _objective_annotations(frame, len(axes), low, high)
    any_missing = any(axis.has_missing for axis in axes)
    line = {"color": GREY, "width": 1}
    shapes = [{"type": "line", "x0": k, "x1": k, "y0": 0, "y1": 1, "line": line} for k in range(len(axes) + 1)]
    made = figure(
        traces,
        annotations=annotations,
        shapes=shapes,
        xaxis={"visible": False, "range": [-0.22, len(axes) + 0.3], "fixedrange": True},
        yaxis={"visible": False, "range": [-0.2 if any_missing else -0.05, 1.14], "fixedrange": True},
        margin={"l": 6, "r": 6, "t": 4, "b": 4},
        hovermode="closest",
    )
    label = "Parallel coordinates: each trial's searched settings and its objective"
    chart = Chart(made, "", label, 380, min_width=_AXIS_WIDTH * (len(axes) + 1))
    lead = "Brighter is better; the thick line is the winner. Trials that were stopped are drawn at their last value."
    if chosen:
        lead += " The selected trials are red."
    return Panel("parallel", "Parallel coordinates", lead, (Charts((chart,), wide=True),))


class _Axis:
    """Axis of one setting: the position of a trial on it, from 0 to 1, and its ticks."""

    def __init__(self, frame: SweepFrame, trials: list[TrialFrame], path: str) -> None:
        self._path, self._name = path, frame.short_names.get(path, path)
        values = [trial.record.params[path] for trial in trials if path in trial.record.params]
        self._log = is_log(frame, path)
        self._numeric = is_numeric_setting(frame, path)
        self._listed = sorted({repr(v): v for v in values}.values(), key=_order if self._numeric else str)
        self.has_missing = len(values) < len(trials)

    def position(self, trial: TrialFrame) -> float:
        """Return the height of the trial's value, 0 to 1; below the axis if the trial lacks the setting."""
        return (
            _MISSING_POSITION
            if self._path not in trial.record.params
            else self._position_of(trial.record.params[self._path])
        )

    def _position_of(self, value: Any) -> float:
        if not self._numeric:
            return [repr(v) for v in self._listed].index(repr(value)) / max(1, len(self._listed) - 1)
        low, high = float(self._listed[0]), float(self._listed[-1])
        if self._log:
            return math.log(value / low) / math.log(high / low)
        return (value - low) / (high - low)

    def annotations(self, axis_index: int) -> list[dict[str, Any]]:
        """Return Plotly annotations of the axis: its ticks and its name, drawn at x = `axis_index`."""
        few = self._listed if len(self._listed) <= 7 else [self._listed[0], self._listed[-1]]
        ticks = [
            _annotation(axis_index, self._position_of(value), escape_text(format_value(value)), "left") for value in few
        ]
        ticks.append(_annotation(axis_index, 1.06, escape_text(self._name), "center", "bottom", 0))
        return (
            [*ticks, _annotation(axis_index, _MISSING_POSITION, "not searched", "left")] if self.has_missing else ticks
        )


def _order(value: Any) -> float:
    return float(value)


def _objective_annotations(frame: SweepFrame, k: int, low: float, high: float) -> list[dict[str, Any]]:
    ends = [_annotation(k, 0.0, format_value(low), "left"), _annotation(k, 1.0, format_value(high), "left")]
    return [
        *ends,
        _annotation(k, 1.06, escape_text(frame.objective.metric.removeprefix("eval_")), "center", "bottom", 0),
    ]


def _annotation(x: float, y: float, text: str, anchor: str, up: str = "middle", shift: int = 5) -> dict[str, Any]:
    return {
        "x": x,
        "y": y,
        "text": text,
        "showarrow": False,
        "xanchor": anchor,
        "yanchor": up,
        "xshift": shift,
        "font": {"size": 11} if shift else {"size": 11, "weight": "bold"},
        "bgcolor": PAPER,
        "borderpad": 1,
    }


def _lines(
    frame: SweepFrame, level: int, rows: list[tuple[TrialFrame, list[float]]], width: float = 1.6, color: str = ""
) -> Any:
    x: list[float | None] = []
    y: list[float | None] = []
    texts: list[str | None] = []
    for trial, positions in rows:
        x += [*range(len(positions)), None]
        y += [*positions, None]
        text = f"trial {escape_text(trial.label)}, {trial.state_label.lower()}: {format_value(frame.value(trial))}"
        texts += [*([f"{text}<br>{escape_text(frame.describe_params(trial))}"] * len(positions)), None]
    red, green, blue = scale_color(_MIN_SHADE + (1 - _MIN_SHADE) * level / (_SHADE_COUNT - 1))
    opacity = 1.0 if width > 2 else 0.35 if frame.selected else 0.85
    line = {"color": color or f"rgba({red},{green},{blue},{opacity})", "width": width}
    return go.Scatter(x=x, y=y, text=texts, mode="lines", line=line, hovertemplate="%{text}<extra></extra>")


def pareto_front_panel(analysis: SweepAnalysis) -> Panel | None:
    """Return the Pareto front as a table, and a scatter plot of each further objective against the first."""
    frame = analysis.frame
    if not frame.further_objectives or not frame.pareto_front:
        return None
    charts = tuple(_chart(frame, other) for other in frame.further_objectives)
    objectives = (frame.objective, *frame.further_objectives)
    head = (
        "trial",
        *(frame.short_names.get(p, p) for p in frame.paths),
        *(f"{g.metric} ({g.direction})" for g in objectives),
    )
    columns = [
        [trial.label for trial in frame.pareto_front],
        *(format_settings([trial.record.params.get(p) for trial in frame.pareto_front]) for p in frame.paths),
        *(format_measured([trial.last(g.metric) for trial in frame.pareto_front], 3) for g in objectives),
    ]
    rows = tuple(zip(*columns, strict=True))
    table = Table(head, rows, frozenset(range(1, len(head))), marked=frozenset({0}))
    lead = (
        "No trial is better than these in one objective without being worse in another. The first objective selects "
        "the winner."
    )
    blocks: list[Block] = [Charts(charts, ((VERMILION, "Pareto front"),)), table]
    return Panel("front", "Pareto front", lead, blocks)


def _chart(frame: SweepFrame, other: Objective) -> Chart:
    shown = [trial for trial in frame.ranked if trial.last(other.metric) is not None]
    best = sorted(frame.pareto_front, key=lambda trial: trial.last(frame.objective.metric) or math.inf)
    on_front = {trial.number for trial in best}
    line = _dots(frame, best, other, "lines+markers", VERMILION, 9)
    rest = [trial for trial in shown if trial.number not in on_front]
    made = figure(
        [_dots(frame, rest, other, "markers", None, 7), line],
        xaxis={"title": {"text": escape_text(frame.objective.metric)}, "zeroline": False},
        yaxis={"title": {"text": escape_text(other.metric)}, "zeroline": False},
        margin={"l": 62, "r": 12, "t": 6, "b": 46},
    )
    return Chart(made, "", f"{other.metric} against {frame.objective.metric} of every complete trial", 340)


def _dots(
    frame: SweepFrame, trials: list[TrialFrame], other: Objective, mode: str, color: str | None, size: int
) -> Any:
    return go.Scatter(
        x=[trial.last(frame.objective.metric) for trial in trials],
        y=[trial.last(other.metric) for trial in trials],
        mode=mode,
        line={"color": color or FAINT_COLOR, "width": 1.5, "dash": "dot"},
        marker={"size": size, "color": color or [state_marker(trial)[0] for trial in trials]},
        text=[f"trial {escape_text(trial.label)}<br>{escape_text(frame.describe_params(trial))}" for trial in trials],
        hovertemplate="%{text}<br>%{x:.4g}, %{y:.4g}<extra></extra>",
    )
