"""Panels of all trials with stop reasons, of the timeline by slot, and of the cost.

The cost panel shows the time spent, the time saved by pruning, and the best value over time.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import plotly.graph_objects as go

from dashboards.analysis.run_costs import AttemptSpan, Costs, attempt_spans, costs, idle_gaps
from dashboards.analysis.sweep_frame import SweepFrame
from dashboards.diagnosis.diagnose import SweepAnalysis
from dashboards.formatting import format_count, format_duration, format_hours, format_measured, format_settings
from dashboards.report.blocks import Block, Chart, Charts, Code, KeyFigure, KeyFigures, Panel, Paragraph, Table
from dashboards.report.figures import BLUE, GOLD, GREEN, GREY, PINK, VERMILION, escape_text, figure, state_marker
from orchestrator.study.retried_trials import never_trained, numbers_text
from orchestrator.study.trial_records import TrialState
from trainer.metrics import CHOSEN, KL, MARGIN

_MAX_REASON_LENGTH = 300
_MAX_TRACEBACKS = 5


def trials_panel(analysis: SweepAnalysis) -> Panel | None:
    """Return stopped trials with their reasons, collapsed tracebacks, and a collapsed table of all trials."""
    frame = analysis.frame
    if not frame.trials:
        return None
    stopped = frame.in_state(TrialState.PRUNED, TrialState.FAILED)
    blocks: list[Block] = []
    if stopped:
        rows = tuple(
            (
                trial.label,
                trial.state_label.lower(),
                frame.describe_params(trial),
                str(trial.curves.last_update),
                _truncate(trial.record.reason),
            )
            for trial in stopped
        )
        many = len(rows) > 12
        if many:
            common = Counter(
                (trial.state_label.lower(), _truncate(trial.record.reason)) for trial in stopped
            ).most_common(8)
            rows_by_reason = tuple((str(n), word, reason) for (word, reason), n in common)
            blocks.append(Table(("trials", "ended", "reason"), rows_by_reason, frozenset({0})))
        fold = f"All {len(rows)} trials that stopped early" if many else ""
        head = ("trial", "ended", "configuration", "update", "reason")
        blocks.append(Table(head, rows, frozenset({3}), folded=fold))
    seen_before: set[str] = set()
    for trial in stopped:
        if trial.failure and trial.failure not in seen_before and len(seen_before) < _MAX_TRACEBACKS:
            seen_before.add(trial.failure)
            blocks.append(Code(f"Trial {trial.label}: end of the traceback", trial.failure, folded=True))
    if failures := _past_failures(frame):
        blocks.append(failures)
    blocks.append(_all_trials_table(frame))
    lead = f"{len(stopped)} of {len(frame.trials)} trials stopped before their last update." if stopped else ""
    if failed := never_trained(trial.record for trial in frame.trials):
        lead += f" {len(failed)} of them failed and were never trained to the end: {numbers_text(failed)}."
        lead += "" if frame.sweeps else f" orchestrate resume {frame.name} --retry-failed tries them again."
    if not stopped:
        blocks.insert(0, Paragraph("No trial failed and none was stopped early."))
    return Panel("trials", "Stopped trials" if stopped else "All trials", lead, blocks)


def _past_failures(frame: SweepFrame) -> Table | None:
    """Return the failures of trials that were tried again; None without any."""
    rows = tuple(
        (trial.label, str(failed.attempt), str(failed.step), _truncate(failed.reason))
        for trial in frame.trials
        for failed in trial.record.failed_attempts
    )
    head = ("trial", "attempt", "update", "failed with")
    return Table(head, rows, frozenset({1, 2}), folded="Failures of trials that were tried again") if rows else None


def _all_trials_table(frame: SweepFrame) -> Table:
    metrics = (*(objective.metric for objective in frame.objectives), MARGIN, CHOSEN, KL, "eval_loss")
    names = list(dict.fromkeys(m for m in metrics if any(trial.last(m) is not None for trial in frame.trials)))
    head = ("trial", "ended", *(frame.short_names.get(p, p) for p in frame.paths), "update", "attempts", *names)
    settings = [format_settings([trial.record.params.get(p) for trial in frame.trials]) for p in frame.paths]
    values = [format_measured([trial.last(name) for trial in frame.trials]) for name in names]
    rows = tuple(
        (
            trial.label,
            trial.state_label.lower(),
            *(column[k] for column in settings),
            f"{trial.curves.last_update}" + (f"/{trial.planned_updates}" if trial.planned_updates else ""),
            str(trial.record.attempts),
            *(column[k] for column in values),
        )
        for k, trial in enumerate(frame.trials)
    )
    return Table(head, rows, frozenset(range(2, len(head))), folded=f"All {len(rows)} trials")


def _truncate(text: str) -> str:
    return text if len(text) <= _MAX_REASON_LENGTH else text[:_MAX_REASON_LENGTH] + " …"


_STATE_COLORS = {
    "complete": GREEN,
    "pruned": GOLD,
    "diverged": PINK,
    "failed": VERMILION,
    "running": BLUE,
}
_GAP = 0.08
"""Share of the running time. Longer pauses of the sweep are cut out of the timeline."""


def timeline_panel(analysis: SweepAnalysis) -> Panel | None:
    """Return one bar per attempt by slot; long pauses of the whole sweep are cut out and marked."""
    frame = analysis.frame
    found = attempt_spans(frame.events, _last_activity(frame))
    if not found or frame.sweeps:
        return None
    busy = _busy(found)
    gaps = idle_gaps(found, max(1.0, _GAP * busy))
    unit, size = ("hours", 3600.0) if busy > 2 * 3600 else ("minutes", 60.0) if busy > 120 else ("seconds", 1.0)
    begun = found[0].begun

    def at(time: float) -> float:
        return (time - begun - sum(end - start for start, end in gaps if end <= time)) / size

    ends: dict[str, list[AttemptSpan]] = {}
    for span in found:
        ends.setdefault(_end(frame, span), []).append(span)
    traces = [_bars(frame, name, rows, at) for name, rows in ends.items()]
    slots = max(span.slot for span in found) + 1
    pauses = [
        {"type": "line", "xref": "x", "yref": "paper", "x0": at(end), "x1": at(end), "y0": 0, "y1": 1}
        | {"line": {"color": GREY, "width": 1, "dash": "dot"}}
        for _, end in gaps
    ]
    annotations = [
        {"x": at(end), "y": 1, "yref": "paper", "yanchor": "bottom", "showarrow": False, "font": {"size": 10}}
        | {"text": f"stopped {format_duration(end - start)}"}
        for start, end in gaps
    ]
    made = figure(
        traces,
        barmode="overlay",
        shapes=pauses,
        annotations=annotations,
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
    legend = tuple((_STATE_COLORS.get(name, GREY), name) for name in ends)
    chart = Chart(made, "", "Timeline of trials by slot", 76 + 40 * slots, min_width=560 if len(found) > 20 else 0)
    lead = "Each bar is one attempt, labeled with its trial. Hover over a bar for the reason it stopped."
    return Panel("timeline", "Timeline", lead, (Charts((chart,), legend, wide=True),))


def _last_activity(frame: SweepFrame) -> float:
    """Return the end of running attempts: the time of loading, without a driver the time of the last event."""
    if frame.state in ("running", "paused"):
        return frame.at
    begun = [(trial.record.started_at, trial.record.seconds) for trial in frame.in_state(TrialState.RUNNING)]
    received = [event.at for event in frame.events] + [at + seconds for at, seconds in begun if at is not None]
    return max(received, default=frame.at)


def _busy(found: list[AttemptSpan]) -> float:
    total, until = 0.0, found[0].begun
    for span in found:
        total += max(0.0, span.ended - max(until, span.begun))
        until = max(until, span.ended)
    return total


def _end(frame: SweepFrame, span: AttemptSpan) -> str:
    trial = next((trial for trial in frame.trials if trial.number == span.trial), None)
    if trial is not None and trial.record.diverged and span.end == "pruned":
        return "diverged"
    if span.end == "running" and frame.state not in ("running", "paused"):
        return "interrupted"
    return span.end if span.end in _STATE_COLORS else "interrupted"


def _bars(frame: SweepFrame, name: str, rows: list[AttemptSpan], at: Any) -> Any:
    by_number = {trial.number: trial for trial in frame.trials}
    texts: list[str] = []
    for span in rows:
        trial = by_number.get(span.trial)
        text = "" if trial is None else f"<br>{escape_text(frame.describe_params(trial))}"
        reason = f"<br>{escape_text(span.text[:160])}" if span.text else ""
        worker = f", worker {span.pid}" if span.pid else ""
        attempt = f", attempt {span.attempt}" if span.attempt > 1 else ""
        took = format_duration(span.ended - span.begun)
        texts.append(f"trial {span.trial}{attempt}: {name} after {took}{worker}{text}{reason}")
    return go.Bar(
        base=[at(span.begun) for span in rows],
        x=[at(span.ended) - at(span.begun) for span in rows],
        y=[span.slot for span in rows],
        orientation="h",
        width=0.78,
        marker={"color": _STATE_COLORS.get(name, GREY), "line": {"width": 1, "color": "rgba(255,255,255,0.7)"}},
        text=[str(span.trial) for span in rows],
        textposition="inside",
        insidetextanchor="middle",
        customdata=texts,
        hovertemplate="%{customdata}<extra></extra>",
    )


def cost_panel(analysis: SweepAnalysis) -> Panel | None:
    """Return key figures, the best value over the time spent, and a table by final state."""
    frame = analysis.frame
    if not frame.trials:
        return None
    total = costs(frame.all_trials)
    unit = "GPU-hours" if frame.gpus else "slot-hours"
    figures = [
        KeyFigure(
            unit,
            format_hours(total.seconds),
            f"{len(frame.all_trials)} trials" + (_wall_time(frame) if frame.hours else ""),
        ),
        KeyFigure("updates", f"{total.updates:,}", f"{total.pairs:,} pairs trained on"),
    ]
    if total.tokens is not None:
        figures.append(KeyFigure("tokens computed in training", format_count(total.tokens)))
    if total.saved_seconds:
        figures.append(
            KeyFigure(
                f"{unit} saved by stopping early", format_hours(total.saved_seconds), f"{total.saved_updates:,} updates"
            )
        )
    blocks: list[Block] = [KeyFigures(tuple(figures))]
    history = None if frame.sweeps else _history(frame)
    if history is not None:
        blocks.append(Charts((history,), wide=True))
    blocks.append(_by_outcome(frame, unit))
    resource = "GPUs of one trial" if frame.gpus else "resources of one trial"
    lead = f"A slot is the {resource}. Saved: the remaining updates of pruned trials at their own speed."
    return Panel("cost", "Cost", lead, blocks)


def _wall_time(frame: SweepFrame) -> str:
    return f", {format_hours(frame.hours * 3600)} h wall time"


def _history(frame: SweepFrame) -> Chart | None:
    ended = sorted(
        (trial for trial in frame.trials if trial.record.finished_at is not None),
        key=lambda trial: trial.record.finished_at or 0.0,
    )
    usage, best = 0.0, None
    line: list[tuple[float, float]] = []
    dots: list[tuple[float, float, Any]] = []
    for trial in ended:
        usage += trial.record.seconds / 3600
        value = frame.value(trial)
        if value is not None:
            dots.append((usage, value, trial))
        if trial.record.value is not None and value is not None:
            best = value if best is None else max(best * frame.sign, value * frame.sign) * frame.sign
        if best is not None:
            line.append((usage, best))
    if len(line) < 2:
        return None
    step = go.Scatter(
        x=[x for x, _ in line],
        y=[y for _, y in line],
        mode="lines",
        line={"color": BLUE, "width": 2, "shape": "hv"},
        hovertemplate="best so far %{y:.4g}<extra></extra>",
    )
    marks = go.Scatter(
        x=[x for x, _, _ in dots],
        y=[y for _, y, _ in dots],
        mode="markers",
        marker={
            "color": [state_marker(trial)[0] for _, _, trial in dots],
            "symbol": [state_marker(trial)[1] for _, _, trial in dots],
            "size": 8,
        },
        text=[
            f"trial {escape_text(trial.label)}, {trial.state_label.lower()}<br>"
            f"{escape_text(frame.describe_params(trial))}"
            for _, _, trial in dots
        ],
        hovertemplate="%{text}<br>%{y:.4g}<extra></extra>",
    )
    made = figure(
        [step, marks],
        xaxis={"title": {"text": "GPU-hours spent" if frame.gpus else "slot-hours spent"}, "rangemode": "tozero"},
        yaxis={"title": {"text": escape_text(frame.objective.metric)}, "zeroline": False},
        margin={"l": 62, "r": 12, "t": 6, "b": 44},
    )
    return Chart(made, "Best value so far", f"Best {frame.objective.metric} against the time spent", 280)


def _by_outcome(frame: SweepFrame, unit: str) -> Table:
    rows: list[tuple[str, ...]] = []
    for end in dict.fromkeys(trial.state_label for trial in frame.all_trials):
        part: Costs = costs([trial for trial in frame.all_trials if trial.state_label == end])
        tokens = "–" if part.tokens is None else format_count(part.tokens)
        saved = format_hours(part.saved_seconds) if part.saved_seconds else "–"
        rows.append((end.lower(), str(part.trials), f"{part.updates:,}", tokens, format_hours(part.seconds), saved))
    head = ("ended as", "trials", "updates", "tokens", unit, "saved")
    return Table(head, tuple(rows), frozenset(range(1, 6)))
