"""What it cost, what pruning saved, and how the best value came with the hours."""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go

from dashboards.blocks import Block, Chart, Charts, Fact, Facts, Panel, Table
from dashboards.costs import Costs, costs
from dashboards.figures import BLUE, end_of, figure, plain
from dashboards.insight import Insight
from dashboards.sweep_frame import SweepFrame


def panel(seen: Insight) -> Panel | None:
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
