"""The collapse map: did the margin grow by raising the chosen responses, or only by burying the rejected ones?

Length bias: does the model prefer the longer response, and more so than before training?

What the models say: the fixed prompts answered by the start model, by the best trial and by the worst.
"""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import plotly.graph_objects as go

from dashboards.analysis.held_out_pairs import HeldOut, spearman
from dashboards.analysis.small_samples import is_clear_correlation
from dashboards.analysis.sweep_frame import Sample, SweepFrame, TrialCase, show
from dashboards.diagnosis.collapse_rules import CHOSEN, CHOSEN_DROP, MARGIN
from dashboards.diagnosis.diagnose import Insight
from dashboards.report.blocks import Block, Chart, Charts, Panel, Replies, Reply, Words
from dashboards.report.figures import BLUE, FAINT, GREEN, GREY, RANKS, VERMILION, end_of, figure, plain


def collapse_panel(seen: Insight) -> Panel | None:
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


_MOST = 800
_BINS = 9


def length_panel(seen: Insight) -> Panel | None:
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


_LONGEST = 4000
_PROMPTS = 12
_MARKS = re.compile(
    r"<\|start_header_id\|>\w+<\|end_header_id\|>|<\|im_start\|>\w+\n|<start_of_turn>\w+\n|<end_of_turn>"
    r"|<\|\w+\|>|</?s>|<bos>|\[/?INST\]"
)
"""Of Llama 3, ChatML, Gemma, Zephyr and Mistral."""


def samples_panel(seen: Insight) -> Panel | None:
    """One block a prompt."""
    frame = seen.frame
    told = [case for case in frame.ranked if _after(case)]
    anybody = next((case for case in frame.trials if case.samples), None)
    if anybody is None:
        return None
    chosen: list[tuple[str, list[Sample]]] = []
    if told:
        chosen.append((f"best, trial {told[0].label}", _after(told[0])))
        if len(told) > 1:
            chosen.append((f"worst that completed, trial {told[-1].label}", _after(told[-1])))
    before = [sample for sample in (told[0] if told else anybody).samples if sample.step == 0]
    prompts = list(dict.fromkeys(s.prompt for _, samples in [("", before), *chosen] for s in samples))
    blocks: list[Block] = []
    for prompt in prompts[:_PROMPTS]:
        replies = [_reply("start model", before, prompt), *(_reply(who, samples, prompt) for who, samples in chosen)]
        expected = next((s.expected for s in before if s.prompt == prompt and s.expected is not None), None)
        blocks.append(Replies(_cut(_as_said(prompt)), expected, tuple(r for r in replies if r is not None)))
    lead = "Greedy answers to fixed held-out prompts." + (" ✓ and ✗: checked by a program." if _checked(before) else "")
    return Panel("samples", "What the models say", lead, blocks) if blocks else None


def _as_said(prompt: str) -> str:
    """The prompt without the chat template's own marks."""
    return _MARKS.sub("", prompt).strip() or prompt


def _after(case: TrialCase) -> list[Sample]:
    last = max((sample.step for sample in case.samples), default=0)
    return [sample for sample in case.samples if sample.step == last and last > 0]


def _checked(samples: list[Sample]) -> bool:
    return any(sample.right is not None for sample in samples)


def _reply(who: str, samples: list[Sample], prompt: str) -> Reply | None:
    found = next((sample for sample in samples if sample.prompt == prompt), None)
    return None if found is None else Reply(who, _cut(found.answer), found.right)


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} … [{len(text) - _LONGEST:,} more characters]"
