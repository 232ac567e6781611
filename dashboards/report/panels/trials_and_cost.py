"""Every trial in a table, and why those that did not complete stopped.

Who ran when, on which slot, and why it stopped.

What it cost, what pruning saved, and how the best value came with the hours.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import plotly.graph_objects as go

from dashboards.analysis.run_costs import Costs, Span, costs, idle_gaps, spans
from dashboards.analysis.sweep_frame import SweepFrame, show
from dashboards.diagnosis.diagnose import Insight
from dashboards.formatting import duration
from dashboards.report.blocks import Block, Chart, Charts, Code, Fact, Facts, Panel, Table, Words
from dashboards.report.figures import BLUE, GOLD, GREEN, GREY, PINK, VERMILION, end_of, figure, plain
from orchestrator.study.trial_records import TrialState

_LONGEST = 300
_TRACEBACKS = 5


def endings_panel(seen: Insight) -> Panel | None:
    """Reasons first, tracebacks on demand, then all trials on demand."""
    frame = seen.frame
    if not frame.trials:
        return None
    stopped = frame.in_state(TrialState.PRUNED, TrialState.FAILED)
    blocks: list[Block] = []
    if stopped:
        rows = tuple(
            (case.label, case.end_word.lower(), frame.words(case), str(case.view.step), _cut(case.record.reason))
            for case in stopped
        )
        many = len(rows) > 12
        if many:
            common = Counter((c.end_word.lower(), _cut(c.record.reason)) for c in stopped).most_common(8)
            rows_by_reason = tuple((str(n), word, reason) for (word, reason), n in common)
            blocks.append(Table(("trials", "ended", "reason"), rows_by_reason, frozenset({0})))
        fold = f"All {len(rows)} trials that stopped early" if many else ""
        head = ("trial", "ended", "configuration", "update", "reason")
        blocks.append(Table(head, rows, frozenset({3}), folded=fold))
    seen_before: set[str] = set()
    for case in stopped:
        if case.failure and case.failure not in seen_before and len(seen_before) < _TRACEBACKS:
            seen_before.add(case.failure)
            blocks.append(Code(f"Trial {case.label}: the end of its traceback", case.failure, folded=True))
    blocks.append(_all(frame))
    lead = f"{len(stopped)} of {len(frame.trials)} trials did not run to their end." if stopped else ""
    if not stopped:
        blocks.insert(0, Words("No trial failed and none was stopped early."))
    return Panel("trials", "What stopped, and why" if stopped else "All trials", lead, blocks)


def _all(frame: SweepFrame) -> Table:
    metrics = (frame.goal.metric, "eval_margins/logp", "eval_logps_per_token/chosen", "eval_loss")
    names = list(dict.fromkeys(m for m in metrics if any(c.last(m) is not None for c in frame.trials)))
    head = ("trial", "ended", *(frame.short.get(p, p) for p in frame.paths), "update", "attempts", *names)
    rows = tuple(
        (
            case.label,
            case.end_word.lower(),
            *(show(case.record.params.get(p)) for p in frame.paths),
            f"{case.view.step}" + (f"/{case.steps}" if case.steps else ""),
            str(case.record.attempts),
            *(show(case.last(name)) for name in names),
        )
        for case in frame.trials
    )
    return Table(head, rows, frozenset(range(2, len(head))), folded=f"All {len(rows)} trials")


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else text[:_LONGEST] + " …"


_COLOURS = {
    "complete": GREEN,
    "pruned": GOLD,
    "diverged": PINK,
    "failed": VERMILION,
    "running": BLUE,
}
_GAP = 0.08
"""Of the time in which anything ran: a longer pause is cut out."""


def timeline_panel(seen: Insight) -> Panel | None:
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


def cost_panel(seen: Insight) -> Panel | None:
    """Facts, the best so far against the time spent, and a row for each way to end."""
    frame = seen.frame
    if not frame.trials:
        return None
    whole = costs(frame.trials)
    unit = "GPU-hours" if frame.gpus else "slot-hours"
    facts = [
        Fact(unit, show_hours(whole.seconds), f"{len(frame.trials)} trials" + (_wall(frame) if frame.hours else "")),
        Fact("updates", f"{whole.updates:,}", f"{whole.pairs:,} pairs trained on"),
    ]
    if whole.tokens is not None:
        facts.append(Fact("tokens computed in training", short_count(whole.tokens)))
    if whole.saved_seconds:
        facts.append(
            Fact(f"{unit} saved by stopping early", show_hours(whole.saved_seconds), f"{whole.saved_updates:,} updates")
        )
    blocks: list[Block] = [Facts(tuple(facts))]
    history = None if frame.sweeps else _history(frame)
    if history is not None:
        blocks.append(Charts((history,), wide=True))
    blocks.append(_by_end(frame, unit))
    lead = f"A slot is what one trial holds{': GPUs' if frame.gpus else ''}. Saved: what the stopped trials had left."
    return Panel("cost", "Cost", lead, blocks)


def _wall(frame: SweepFrame) -> str:
    return f", {show_hours(frame.hours * 3600)} h on the clock"


def show_hours(seconds: float) -> str:
    """Hours with two digits that matter."""
    hours = seconds / 3600
    return f"{hours:.2f}" if hours < 10 else f"{hours:,.1f}"


def short_count(count: float) -> str:
    """1.2 M, 350 k, 42."""
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:.0f}"


def _history(frame: SweepFrame) -> Chart | None:
    ended = sorted(
        (case for case in frame.trials if case.record.finished_at is not None),
        key=lambda case: case.record.finished_at or 0.0,
    )
    spent, best = 0.0, None
    line: list[tuple[float, float]] = []
    dots: list[tuple[float, float, Any]] = []
    for case in ended:
        spent += case.record.seconds / 3600
        value = frame.value(case)
        if value is not None:
            dots.append((spent, value, case))
        if case.record.value is not None and value is not None:
            best = value if best is None else max(best * frame.sign, value * frame.sign) * frame.sign
        if best is not None:
            line.append((spent, best))
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
        marker={"color": [end_of(c)[0] for _, _, c in dots], "symbol": [end_of(c)[1] for _, _, c in dots], "size": 8},
        text=[f"trial {plain(c.label)}, {c.end_word.lower()}<br>{plain(frame.words(c))}" for _, _, c in dots],
        hovertemplate="%{text}<br>%{y:.4g}<extra></extra>",
    )
    made = figure(
        [step, marks],
        xaxis={"title": {"text": "GPU-hours spent" if frame.gpus else "slot-hours spent"}, "rangemode": "tozero"},
        yaxis={"title": {"text": plain(frame.goal.metric)}, "zeroline": False},
        margin={"l": 62, "r": 12, "t": 6, "b": 44},
    )
    return Chart(made, "The best so far", f"Best {frame.goal.metric} against the time spent", 280)


def _by_end(frame: SweepFrame, unit: str) -> Table:
    rows: list[tuple[str, ...]] = []
    for end in dict.fromkeys(case.end_word for case in frame.trials):
        part: Costs = costs([case for case in frame.trials if case.end_word == end])
        tokens = "–" if part.tokens is None else short_count(part.tokens)
        saved = show_hours(part.saved_seconds) if part.saved_seconds else "–"
        rows.append((end.lower(), str(part.trials), f"{part.updates:,}", tokens, show_hours(part.seconds), saved))
    head = ("ended as", "trials", "updates", "tokens", unit, "saved")
    return Table(head, tuple(rows), frozenset(range(1, 6)))
