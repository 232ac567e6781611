"""Heatmaps of the objective over two settings, one per value of a third (for SimPO beta x gamma by learning rate),
and the interactions of settings.

A cell shows the best complete trial of a combination and marks trials that did not complete. Settings sampled from
ranges are drawn as a scatter plot with one point per trial.
"""

from __future__ import annotations

from statistics import fmean
from typing import Any

import plotly.graph_objects as go

from dashboards.analysis.interactions import GAMMAS, Interaction, describe, interacting_paths, interactions
from dashboards.analysis.param_effects import MAX_COMPARED, SEED, is_log, is_numeric_setting, levels, values_of
from dashboards.analysis.sweep_frame import SweepFrame, TrialFrame
from dashboards.diagnosis.diagnose import SweepAnalysis
from dashboards.formatting import format_intervals, format_value
from dashboards.report.blocks import Block, Chart, Charts, Panel, Paragraph, Table
from dashboards.report.figures import (
    GREY,
    RANK_COLORS,
    STATE_MARKERS,
    VERMILION,
    color_scale,
    escape_text,
    figure,
    scale_color,
    state_marker,
    text_color_on,
)
from trainer.results import clause

STATE_MARKS = {"PRUNED": "▼ pruned", "DIVERGED": "✕ diverged", "FAILED": "■ failed", "RUNNING": "◆ running"}


def heatmap_cells(
    frame: SweepFrame, x: str, y: str | None, facet: tuple[str, Any] | None, span: tuple[float, float]
) -> Chart:
    """Draw one heatmap.

    Args:
        frame: the sweep.
        x: setting of the columns.
        y: setting of the rows; None for a single row.
        facet: path and value of a third setting to which the trials are restricted.
        span: lowest and highest objective value, the ends of the color scale.
    """
    columns = values_of(frame, x)
    rows: list[Any] = [None] if y is None else values_of(frame, y)
    z: list[list[float | None]] = []
    hover: list[list[str]] = []
    annotations: list[dict[str, Any]] = []
    for r, row in enumerate(rows):
        z.append([])
        hover.append([])
        for trial, column in enumerate(columns):
            in_cell = [
                trial for trial in frame.trials if _is_at(trial, [(x, column), *([(y, row)] if y else [])], facet)
            ]
            numbers = {trial.number for trial in in_cell}
            best = next((trial for trial in frame.ranked if trial.number in numbers), None)
            value = None if best is None else best.record.value
            z[-1].append(value)
            hover[-1].append(hover_text(frame, in_cell) or "not tried")
            text, ink = _cell_text(frame, in_cell, best, span)
            if text:
                annotations.append(
                    {"x": trial, "y": r, "text": text, "showarrow": False, "font": {"size": 11, "color": ink}}
                )
    low, high = span
    trace = go.Heatmap(
        z=z,
        x=list(range(len(columns))),
        y=list(range(len(rows))),
        text=hover,
        hovertemplate="%{text}<extra></extra>",
        colorscale=color_scale(frame.sign),
        zmin=low,
        zmax=high if high > low else low + 1e-9,
        showscale=False,
        xgap=3,
        ygap=3,
    )
    # Cells without a complete trial have no color; a border makes them visible.
    empty = [
        {
            "type": "rect",
            "x0": trial - 0.47,
            "x1": trial + 0.47,
            "y0": r - 0.46,
            "y1": r + 0.46,
            "line": {"color": GREY, "width": 1, "dash": "dot"},
        }
        for r, line in enumerate(z)
        for trial, value in enumerate(line)
        if value is None
    ]
    chosen = [trial for trial in frame.trials if trial.label in frame.selected]
    marked = [
        {
            "type": "rect",
            "x0": k - 0.48,
            "x1": k + 0.48,
            "y0": r - 0.47,
            "y1": r + 0.47,
            "line": {"color": VERMILION, "width": 3},
        }
        for r, row in enumerate(rows)
        for k, column in enumerate(columns)
        if any(_is_at(trial, [(x, column), *([(y, row)] if y else [])], facet) for trial in chosen)
    ]
    layout = figure(
        [trace],
        annotations=annotations,
        shapes=empty + marked,
        xaxis=_axis(frame, x, columns),
        yaxis={"visible": False} if y is None else _axis(frame, y, rows),
        margin={"l": 24 if y is None else 64, "r": 10, "t": 8, "b": 44},
    )
    title = "" if facet is None else f"{frame.short_names.get(facet[0], facet[0])} {format_value(facet[1])}"
    label = (
        f"Heatmap of {frame.objective.metric} over {x}" + (f" and {y}" if y else "") + (f", {title}" if title else "")
    )
    return Chart(layout, title, label, height=92 + max(1, len(rows)) * 54, min_width=110 + 64 * len(columns))


def _axis(frame: SweepFrame, path: str, values: list[Any]) -> dict[str, Any]:
    return {
        "title": {"text": escape_text(frame.short_names.get(path, path))},
        "tickvals": list(range(len(values))),
        "ticktext": [escape_text(format_value(value)) for value in values],
        "showgrid": False,
        "zeroline": False,
        "range": [-0.5, len(values) - 0.5],
        "fixedrange": True,
    }


def _is_at(trial: TrialFrame, positions: list[tuple[str, Any]], facet: tuple[str, Any] | None) -> bool:
    selected = [*positions, *([facet] if facet else [])]
    return all(p in trial.record.params and repr(trial.record.params[p]) == repr(v) for p, v in selected)


def _cell_text(
    frame: SweepFrame, in_cell: list[TrialFrame], best: TrialFrame | None, span: tuple[float, float]
) -> tuple[str, str]:
    marks = dict.fromkeys(STATE_MARKS[trial.state_label] for trial in in_cell if trial.state_label in STATE_MARKS)
    if best is None or best.record.value is None:
        ends = [trial.state_label for trial in in_cell if trial.state_label in STATE_MARKS]
        return "<br>".join(marks), STATE_MARKERS[ends[0]][0] if ends else GREY
    low, high = span
    share = (best.record.value - low) / (high - low) if high > low else 0.5
    star = "★ " if best in frame.eligible[:1] else ""
    others = " " + "".join(mark[0] for mark in marks) if marks else ""
    return f"{star}{format_value(best.record.value)}{others}", text_color_on(
        scale_color(share if frame.sign > 0 else 1 - share)
    )


def hover_text(frame: SweepFrame, trials: list[TrialFrame]) -> str:
    """Return the hover text of these trials: state, objective value and reason of each."""
    lines = [
        f"trial {trial.label}: {trial.state_label.lower()}, {format_value(frame.value(trial))}"
        + (f"<br>  {escape_text(trial.record.reason[:90])}" if trial.record.reason else "")
        for trial in trials
    ]
    return "<br>".join(lines[:8]) + (f"<br>and {len(lines) - 8} more" if len(lines) > 8 else "")


def scatter_points(frame: SweepFrame, x: str, y: str, span: tuple[float, float]) -> Chart:
    """Draw every trial as a point; color: objective value, shape: state."""
    shown = [trial for trial in frame.trials if x in trial.record.params and y in trial.record.params]
    best = frame.eligible[0] if frame.eligible else None
    known = [trial for trial in shown if frame.value(trial) is not None]
    traces: list[Any] = []
    for trials, colored in ((known, True), ([trial for trial in shown if trial not in known], False)):
        if trials:
            traces.append(_scatter(frame, trials, x, y, span, best, colored))
    axes = [
        {
            "title": {"text": escape_text(frame.short_names.get(p, p))},
            **({"type": "log"} if is_log(frame, p) else {} if is_numeric_setting(frame, p) else {"type": "category"}),
        }
        for p in (x, y)
    ]
    made = figure(traces, xaxis=axes[0], yaxis=axes[1], margin={"l": 62, "r": 10, "t": 8, "b": 46})
    return Chart(made, "", f"{frame.objective.metric} of every trial over {x} and {y}", height=420)


def _scatter(
    frame: SweepFrame,
    trials: list[TrialFrame],
    x: str,
    y: str,
    span: tuple[float, float],
    best: TrialFrame | None,
    colored: bool,
) -> Any:
    marker: dict[str, Any] = {
        "size": [18 if trial is best else 11 for trial in trials],
        "symbol": ["star" if trial is best else state_marker(trial)[1] for trial in trials],
        "line": {
            "width": [3 if trial.label in frame.selected else 1 for trial in trials],
            "color": [VERMILION if trial.label in frame.selected else GREY for trial in trials],
        },
    }
    if colored:
        marker |= {"color": [frame.value(trial) for trial in trials], "colorscale": color_scale(frame.sign)}
        marker |= {"cmin": span[0], "cmax": span[1], "showscale": True}
        marker |= {"colorbar": {"thickness": 10, "outlinewidth": 0, "len": 0.9}}
    else:
        marker["color"] = GREY
    return go.Scatter(
        x=[trial.record.params[x] for trial in trials],
        y=[trial.record.params[y] for trial in trials],
        mode="markers",
        marker=marker,
        text=[hover_text(frame, [trial]) + f"<br>{escape_text(frame.describe_params(trial))}" for trial in trials],
        hovertemplate="%{text}<extra></extra>",
    )


_MAX_VALUES = 14
_MAX_MAPS = 9
_LEARNING_RATE = "training.learning_rate"


def heatmap_panel(analysis: SweepAnalysis) -> Panel | None:
    """Return heatmaps where the settings have few values, a scatter plot where they were sampled from ranges."""
    frame = analysis.frame
    paths = choose_axes(analysis)
    if len(paths) < 1 or len(frame.trials) < 2:
        return None
    values = [value for trial in frame.trials if (value := frame.value(trial)) is not None]
    span = (min(values), max(values)) if values else (0.0, 1.0)
    names = [frame.short_names.get(path, path) for path in paths]
    lead = f"{frame.objective.metric} of the best complete trial; brighter is better.{_legend(frame)}"
    if len(paths) == 1:
        return Panel(
            "map", f"Objective by {names[0]}", lead, (Charts((heatmap_cells(frame, paths[0], None, None, span),)),)
        )
    if any(len(values_of(frame, path)) > _MAX_VALUES for path in paths[:2]):
        chart = scatter_points(frame, paths[0], paths[1], span)
        lead = f"{frame.objective.metric} of every trial; brighter is better.{_legend(frame)}"
        return Panel("map", f"Objective by {names[1]} and {names[0]}", lead, (Charts((chart,), wide=True),))
    if len(paths) == 2:
        maps = [heatmap_cells(frame, paths[0], paths[1], None, span)]
    else:
        shown = values_of(frame, paths[2])[:_MAX_MAPS]
        maps = [heatmap_cells(frame, paths[0], paths[1], (paths[2], value), span) for value in shown]
    return Panel("map", f"Objective by {names[1]} and {names[0]}", lead, (Charts(tuple(maps)),))


def _legend(frame: SweepFrame) -> str:
    """Return the legend of the state marks that occur."""
    marks = [mark for word, mark in STATE_MARKS.items() if any(trial.state_label == word for trial in frame.trials)]
    return f" {', '.join(marks)}." if marks else ""


def choose_axes(analysis: SweepAnalysis) -> tuple[str, ...]:
    """Return the settings of x, y and of the separate maps, at most three.

    Gamma, beta and the learning rate where they are searched, else the settings of highest importance.
    """
    frame = analysis.frame
    varied = [p for p in frame.paths if p != SEED and len(values_of(frame, p)) > 1]
    gamma = next((p for p in GAMMAS if p in varied), None)
    if gamma is not None and "loss.beta" in varied:
        first = [gamma, "loss.beta", *([_LEARNING_RATE] if _LEARNING_RATE in varied else [])]
    else:
        first = []
    weight = analysis.importances
    rest = sorted(varied, key=lambda p: (not is_numeric_setting(frame, p), -weight.get(p, 0.0), varied.index(p)))
    chosen = list(dict.fromkeys([*first, *rest]))[:3]
    if len(chosen) > 2 and len(values_of(frame, chosen[2])) > _MAX_MAPS:
        chosen = chosen[:2]
    return tuple(chosen)


# --- interactions ----------------------------------------------------------------------------------------------------


def interactions_panel(analysis: SweepAnalysis) -> Panel | None:
    """Return the two-factor effects of beta, gamma and learning rate (else of the most important settings)."""
    frame = analysis.frame
    paths = interacting_paths(frame, list(analysis.importances))
    if len(paths) < 2:
        return None
    found = interactions(frame, paths)
    known = [each for each in found if each.steps is not None]
    effects = iter(format_intervals([(each.mean, each.low, each.high) for each in known]))
    rows = [
        (
            " × ".join(frame.short_names.get(path, path) for path in (each.first, each.second)),
            describe(frame, each),
            "–" if each.steps is None else next(effects),
            _interaction_text(each),
        )
        for each in found
    ]
    blocks: list[Block] = []
    if known:
        blocks.append(Table(("settings", "largest effect", "difference (95 %, together)", ""), tuple(rows)))
    else:
        blocks += [Paragraph(f"{name}: {clause(reason)}.") for name, reason, *_ in rows]
    charts = [_lines(frame, each) for each in known if not each.fitted]
    if charts:
        blocks.append(Charts(tuple(charts)))
    lead = (
        f"By how much more the first setting's step changes {frame.objective.metric} at one value of the second "
        "setting than at another, all else equal. Where the interval includes 0, these trials do not show that the two "
        "settings depend on each other."
    )
    return Panel("interactions", "Interactions of settings", lead, blocks)


def _interaction_text(found: Interaction) -> str:
    if found.steps is None:
        return ""
    how = "linear model" if found.fitted else "differences of matched trials"
    return f"{'depend on each other' if found.is_clear else 'not distinguishable from none'} ({how})"


def _lines(frame: SweepFrame, found: Interaction) -> Chart:
    """Draw the mean objective along the first setting, a line for each value of the second."""
    numeric = is_numeric_setting(frame, found.first)
    others = [level.value for level in levels(frame, found.second)][:MAX_COMPARED]
    traces: list[Any] = []
    for k, other in enumerate(others):
        points: list[tuple[Any, float]] = []
        for level in levels(frame, found.first):
            at = [t for t in level.trials if repr(t.record.params.get(found.second)) == repr(other)]
            values = [t.record.value for t in at if t.record.value is not None]
            if values:
                points.append((level.value if numeric else escape_text(format_value(level.value)), fmean(values)))
        name = escape_text(f"{frame.short_names.get(found.second, found.second)} {format_value(other)}")
        color = RANK_COLORS[k] if k < len(RANK_COLORS) else GREY
        traces.append(
            go.Scatter(
                x=[x for x, _ in points],
                y=[y for _, y in points],
                mode="lines+markers+text",
                text=[*[""] * (len(points) - 1), name],
                textposition="top left",
                line={"color": color, "width": 2},
                hovertemplate=f"{name}: %{{y:.4g}}<extra></extra>",
            )
        )
    axis: dict[str, Any] = {"title": {"text": escape_text(frame.short_names.get(found.first, found.first))}}
    axis |= {"type": "log" if is_log(frame, found.first) else "linear"} if numeric else {"type": "category"}
    made = figure(traces, xaxis=axis, yaxis={"zeroline": False}, margin={"l": 54, "r": 12, "t": 6, "b": 42})
    title = f"by {found.first.rsplit('.', 1)[-1]} for each {found.second.rsplit('.', 1)[-1]}"
    return Chart(made, title, f"Mean {frame.objective.metric} along {found.first} for each {found.second}", 260)
