"""Panels of response quality: collapse, length bias, samples.

Collapse: whether the margin grew by raising the chosen responses or only by lowering the rejected ones. Length bias:
whether the model prefers longer responses, and more than before training. Samples: answers of the initial model, the
best trial and the worst trial to fixed prompts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from dashboards.analysis.held_out_pairs import HeldOutPairs, spearman
from dashboards.analysis.small_samples import is_clear_correlation
from dashboards.analysis.sweep_frame import Sample, SweepFrame, TrialFrame
from dashboards.diagnosis.collapse_rules import CHOSEN_DROP
from dashboards.diagnosis.diagnose import SweepAnalysis
from dashboards.formatting import format_value
from dashboards.report.blocks import Block, Chart, Charts, ModelReply, Panel, Paragraph, Replies
from dashboards.report.figures import (
    BLUE,
    FAINT_COLOR,
    GREEN,
    GREY,
    RANK_COLORS,
    VERMILION,
    escape_text,
    figure,
    state_marker,
)
from trainer.metrics import CHOSEN, MARGIN


def collapse_panel(analysis: SweepAnalysis) -> Panel | None:
    """Return a scatter plot of margin change against chosen log-prob change since step 0, in nats per token."""
    frame = analysis.frame
    changes = [
        (trial, chosen, margin)
        for trial in frame.trials
        if (chosen := trial.change(CHOSEN)) is not None and (margin := trial.change(MARGIN)) is not None
    ]
    if not changes:
        return None
    ranks = {trial.number: k for k, trial in enumerate(frame.highlighted[: len(RANK_COLORS)])}
    traces: list[Any] = [
        _path(trial, RANK_COLORS[ranks[trial.number]]) for trial, _, _ in changes if trial.number in ranks
    ]
    traces.append(_marks(frame, changes, ranks))
    ends = [0.0, *(y for trial, _, _ in changes for y in _margins(trial))]
    padding = 0.12 * (max(ends) - min(ends)) or 0.1
    bottom, top = min(ends) - padding, max(ends) + padding
    low = min(0.0, *(x for _, x, _ in changes)) - 0.02
    annotations = [
        _annotation("collapse: chosen falls too", VERMILION, 0.01, 0.99, "left"),
        _annotation("healthy", GREEN, 0.99, 0.99, "right"),
    ]
    zero = {"type": "line", "line": {"color": GREY, "width": 1, "dash": "dot"}}
    limit = {"type": "line", "line": {"color": VERMILION, "width": 1, "dash": "dash"}}
    shapes: list[dict[str, Any]] = [
        {**zero, "xref": "x", "yref": "paper", "x0": 0, "x1": 0, "y0": 0, "y1": 1},
        {**zero, "xref": "paper", "yref": "y", "x0": 0, "x1": 1, "y0": 0, "y1": 0},
    ]
    if low < -CHOSEN_DROP:
        shapes.append({**limit, "xref": "x", "yref": "paper", "x0": -CHOSEN_DROP, "x1": -CHOSEN_DROP, "y0": 0, "y1": 1})
    made = figure(
        traces,
        annotations=annotations,
        shapes=shapes,
        xaxis={"title": {"text": "change of the chosen log-prob per token"}, "zeroline": False},
        yaxis={"title": {"text": "change of the margin per token"}, "zeroline": False, "range": [bottom, top]},
        margin={"l": 62, "r": 14, "t": 26, "b": 46},
    )
    lead = (
        "The margin can grow while the chosen responses become less likely, because the rejected ones fall faster. The "
        "initial model is at the origin; lines show the best trials during training, in the colors of their curves."
    )
    label = "Change of the margin against change of the chosen log-prob of each trial"
    return Panel("collapse", "Collapse", lead, (Charts((Chart(made, "", label, 400),), wide=True),))


def _margins(trial: TrialFrame) -> list[float]:
    values = [value for _, value in trial.curves.curves.get(MARGIN, []) if math.isfinite(value)]
    return [value - values[0] for value in values]


def _path(trial: TrialFrame, color: str) -> Any:
    chosen, margin = dict(trial.curves.curves.get(CHOSEN, [])), dict(trial.curves.curves.get(MARGIN, []))
    steps = sorted(chosen.keys() & margin.keys())
    return go.Scatter(
        x=[chosen[step] - chosen[steps[0]] for step in steps],
        y=[margin[step] - margin[steps[0]] for step in steps],
        mode="lines",
        line={"color": color, "width": 1.4},
        hoverinfo="skip",
    )


def _marks(frame: SweepFrame, changes: list[tuple[TrialFrame, float, float]], ranks: dict[int, int]) -> Any:
    trials = [trial for trial, _, _ in changes]
    return go.Scatter(
        x=[x for _, x, _ in changes],
        y=[y for _, _, y in changes],
        mode="markers+text" if len(changes) <= 30 else "markers",
        text=[escape_text(trial.label) for trial in trials],
        textposition=_label_positions([(x, y) for _, x, y in changes]),
        marker={
            "size": [13 if ranks.get(trial.number) == 0 else 9 for trial in trials],
            "symbol": ["star" if ranks.get(trial.number) == 0 else state_marker(trial)[1] for trial in trials],
            "color": [
                RANK_COLORS[ranks[trial.number]] if trial.number in ranks else state_marker(trial)[0]
                for trial in trials
            ],
            "line": {"width": 1, "color": FAINT_COLOR},
        },
        customdata=[
            f"trial {escape_text(trial.label)}, {trial.state_label.lower()}<br>"
            f"{escape_text(frame.describe_params(trial))}"
            f"<br>{escape_text(frame.objective.metric)} {format_value(frame.value(trial))}"
            for trial in trials
        ],
        hovertemplate="%{customdata}<br>chosen %{x:+.3g}, margin %{y:+.3g}<extra></extra>",
    )


def _label_positions(points: list[tuple[float, float]]) -> list[str]:
    """Return the position of each label: above its mark, or to another side where a neighbor is close."""
    wide = max(x for x, _ in points) - min(x for x, _ in points) or 1.0
    high = max(y for _, y in points) - min(y for _, y in points) or 1.0
    out: list[str] = []
    for k, (x, y) in enumerate(points):
        close = sum(abs(x - a) < 0.03 * wide and abs(y - b) < 0.2 * high for a, b in points[:k])
        out.append(("top center", "middle right", "bottom center", "middle left")[close % 4])
    return out


def _annotation(text: str, color: str, x: float, y: float, anchor: str) -> dict[str, Any]:
    return {
        "text": text,
        "showarrow": False,
        "xref": "paper",
        "yref": "paper",
        "x": x,
        "y": y,
        "xanchor": anchor,
        "yanchor": "bottom",
        "font": {"color": color, "size": 12},
    }


_MAX_DOTS = 800
_BINS = 9


def length_panel(analysis: SweepAnalysis) -> Panel | None:
    """Return margin against length difference of every held-out pair of the winner, with means before and after."""
    frame = analysis.frame
    trial = next((trial for trial in frame.ranked if trial.held_out_pairs is not None), None)
    if trial is None or trial.held_out_pairs is None or not trial.held_out_pairs.paired:
        return None
    pairs, initial = trial.held_out_pairs, trial.held_out_pairs.initial()
    if np.ptp(pairs.length_differences) == 0:
        return None
    step = max(1, -(-len(pairs) // _MAX_DOTS))
    dots = go.Scatter(
        x=pairs.length_differences[::step].tolist(),
        y=pairs.margins[::step].tolist(),
        mode="markers",
        marker={"size": 5, "color": BLUE, "opacity": 0.25},
        hovertemplate="%{x:+d} tokens: margin %{y:.3g}<extra></extra>",
    )
    traces: list[Any] = [dots, _means(pairs, VERMILION, f"trial {trial.label}")]
    legend = [(VERMILION, f"mean margin, trial {trial.label}")]
    if initial is not None:
        traces.insert(1, _means(initial, GREY, "initial model"))
        legend.append((GREY, "mean margin, initial model"))
    zero = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": 0, "y1": 0, "line": {"color": GREY, "width": 1}}
    made = figure(
        traces,
        shapes=[zero],
        xaxis={"title": {"text": "tokens of chosen minus tokens of rejected"}, "zeroline": False},
        yaxis={"title": {"text": "margin per token"}, "zeroline": False},
        margin={"l": 58, "r": 12, "t": 6, "b": 46},
    )
    after = spearman(pairs.margins, pairs.length_differences)
    before = None if initial is None else spearman(initial.margins, initial.length_differences)
    if after is None:
        return None
    text = f"Rank correlation of margin and length difference: {after:+.2f}"
    text += "" if before is None else f", {before:+.2f} before training"
    text += f", over {len(pairs):,} held-out pairs" + (f" ({-(-len(pairs) // step):,} drawn)." if step > 1 else ".")
    if not is_clear_correlation(after, len(pairs)):
        text += " This is not significant with this number of pairs."
    text += " Above 0 the model prefers longer responses, below 0 shorter ones."
    label = "Margin of each held-out pair against its difference in length"
    chart = Chart(made, "", label, 340)
    return Panel("length", "Length bias", "", (Charts((chart,), tuple(legend), wide=True), Paragraph(text)))


def _means(pairs: HeldOutPairs, color: str, name: str) -> Any:
    """Draw the mean margin in bins with about equal numbers of pairs."""
    order = np.argsort(pairs.length_differences, kind="stable")
    groups = [group for group in np.array_split(order, min(_BINS, len(order))) if len(group)]
    return go.Scatter(
        x=[float(pairs.length_differences[group].mean()) for group in groups],
        y=[float(pairs.margins[group].mean()) for group in groups],
        mode="lines+markers",
        line={"color": color, "width": 2.4},
        marker={"size": 6, "color": color},
        hovertemplate=f"{name}: %{{y:.3g}}<extra></extra>",
    )


_MAX_TEXT_LENGTH = 4000
_MAX_PROMPTS = 12
_MARKS = re.compile(
    r"<\|start_header_id\|>\w+<\|end_header_id\|>|<\|im_start\|>\w+\n|<start_of_turn>\w+\n|<end_of_turn>"
    r"|<\|\w+\|>|</?s>|<bos>|\[/?INST\]"
)
"""Chat template tokens of Llama 3, ChatML, Gemma, Zephyr and Mistral."""


def samples_panel(analysis: SweepAnalysis) -> Panel | None:
    """Return one block per prompt with the initial model's, the best trial's and the worst trial's answers."""
    frame = analysis.frame
    with_samples = [trial for trial in frame.ranked if _last_samples(trial)]
    first_sampled = next((trial for trial in frame.trials if trial.samples), None)
    if first_sampled is None:
        return None
    chosen: list[tuple[str, list[Sample]]] = []
    if with_samples:
        chosen.append((f"best, trial {with_samples[0].label}", _last_samples(with_samples[0])))
        if len(with_samples) > 1:
            chosen.append((f"worst complete, trial {with_samples[-1].label}", _last_samples(with_samples[-1])))
    before = _samples_before(with_samples[0] if with_samples else first_sampled)
    blocks = _replies(before, chosen)
    lead = "Greedy answers to fixed held-out prompts." + (
        " ✓ and ✗: right and wrong by the task's checker." if _has_checked(before) else ""
    )
    return Panel("samples", "Samples", lead, blocks) if blocks else None


def compared_samples(trials: Sequence[tuple[str, TrialFrame]]) -> list[Block]:
    """Return one block per prompt with the answers of the initial model and of these trials, given with their names."""
    before = next((found for _, trial in trials if (found := _samples_before(trial))), [])
    return _replies(before, [(label, _last_samples(trial)) for label, trial in trials])


def _samples_before(trial: TrialFrame) -> list[Sample]:
    return [sample for sample in trial.samples if sample.step == 0]


def _replies(before: list[Sample], chosen: Sequence[tuple[str, list[Sample]]]) -> list[Block]:
    prompts = list(dict.fromkeys(s.prompt for _, samples in [("", before), *chosen] for s in samples))
    blocks: list[Block] = []
    for prompt in prompts[:_MAX_PROMPTS]:
        replies = [
            _model_reply("initial model", before, prompt),
            *(_model_reply(label, samples, prompt) for label, samples in chosen),
        ]
        expected = next((s.expected for s in before if s.prompt == prompt and s.expected is not None), None)
        blocks.append(
            Replies(_truncate(_without_template(prompt)), expected, tuple(r for r in replies if r is not None))
        )
    return blocks


def _without_template(prompt: str) -> str:
    """Return the prompt without chat template tokens."""
    return _MARKS.sub("", prompt).strip() or prompt


def _last_samples(trial: TrialFrame) -> list[Sample]:
    last = max((sample.step for sample in trial.samples), default=0)
    return [sample for sample in trial.samples if sample.step == last and last > 0]


def _has_checked(samples: list[Sample]) -> bool:
    return any(sample.right is not None for sample in samples)


def _model_reply(label: str, samples: list[Sample], prompt: str) -> ModelReply | None:
    found = next((sample for sample in samples if sample.prompt == prompt), None)
    return None if found is None else ModelReply(label, _truncate(found.answer), found.right)


def _truncate(text: str) -> str:
    return (
        text
        if len(text) <= _MAX_TEXT_LENGTH
        else f"{text[:_MAX_TEXT_LENGTH]} … [{len(text) - _MAX_TEXT_LENGTH:,} more characters]"
    )
