"""Length bias: does the model prefer the longer response, and more so than before training?"""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go

from dashboards.blocks import Chart, Charts, Panel, Words
from dashboards.figures import BLUE, GREY, VERMILION, figure
from dashboards.insight import Insight
from dashboards.pairs import HeldOut, spearman
from dashboards.small_samples import is_clear_correlation

_MOST = 800
_BINS = 9


def panel(seen: Insight) -> Panel | None:
    """Margin against length difference of every held-out pair under the winner, with means, and the start's means."""
    frame = seen.frame
    case = next((case for case in frame.ranked if case.pairs is not None), None)
    if case is None or case.pairs is None:
        return None
    pairs, start = case.pairs, case.pairs.at_start()
    if np.ptp(pairs.length_differences) == 0:
        return None
    step = max(1, -(-len(pairs) // _MOST))
    dots = go.Scatter(
        x=pairs.length_differences[::step].tolist(),
        y=pairs.gaps[::step].tolist(),
        mode="markers",
        marker={"size": 5, "color": BLUE, "opacity": 0.25},
        hovertemplate="%{x:+d} tokens: margin %{y:.3g}<extra></extra>",
    )
    traces: list[Any] = [dots, _means(pairs, VERMILION, f"trial {case.label}")]
    legend = [(VERMILION, f"mean margin, trial {case.label}")]
    if start is not None:
        traces.insert(1, _means(start, GREY, "start model"))
        legend.append((GREY, "mean margin, start model"))
    zero = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": 0, "y1": 0, "line": {"color": GREY, "width": 1}}
    made = figure(
        traces,
        shapes=[zero],
        xaxis={"title": {"text": "tokens of chosen minus tokens of rejected"}, "zeroline": False},
        yaxis={"title": {"text": "margin per token"}, "zeroline": False},
        margin={"l": 58, "r": 12, "t": 6, "b": 46},
    )
    after = spearman(pairs.gaps, pairs.length_differences)
    before = None if start is None else spearman(start.gaps, start.length_differences)
    if after is None:
        return None
    words = f"Rank correlation of margin and length difference: {after:+.2f}"
    words += "" if before is None else f", {before:+.2f} before training"
    words += f", over {len(pairs):,} held-out pairs" + (f" ({-(-len(pairs) // step):,} drawn)." if step > 1 else ".")
    if not is_clear_correlation(after, len(pairs)):
        words += " That is no more than chance gives with as many pairs."
    words += " Above 0 the model prefers the longer of two responses, below 0 the shorter; near 0 it does not care."
    label = "Margin of each held-out pair against its difference in length"
    chart = Chart(made, "", label, 340)
    return Panel("length", "Length bias", "", (Charts((chart,), tuple(legend), wide=True), Words(words)))


def _means(pairs: HeldOut, colour: str, name: str) -> Any:
    """Mean margin in bins of about equal numbers of pairs."""
    order = np.argsort(pairs.length_differences, kind="stable")
    groups = [group for group in np.array_split(order, min(_BINS, len(order))) if len(group)]
    return go.Scatter(
        x=[float(pairs.length_differences[group].mean()) for group in groups],
        y=[float(pairs.gaps[group].mean()) for group in groups],
        mode="lines+markers",
        line={"color": colour, "width": 2.4},
        marker={"size": 6, "color": colour},
        hovertemplate=f"{name}: %{{y:.3g}}<extra></extra>",
    )
