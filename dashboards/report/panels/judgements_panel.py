"""Panel of judgements: win rates of the best trials' answers against the initial model's."""

from __future__ import annotations

import plotly.graph_objects as go

from dashboards.analysis.sweep_frame import TrialFrame
from dashboards.diagnosis.diagnose import SweepAnalysis
from dashboards.report.blocks import Block, Chart, Charts, ModelReply, Panel, Paragraph, Replies, Table
from dashboards.report.figures import BLUE, GREEN, GREY, PINK, VERMILION, escape_text, figure
from dashboards.terminal.judge_output import EXTRA_HEAD, HEAD, extra_rows, joint_conclusion, table_row
from orchestrator.judge.judgements import Judgement, most_important

_EXAMPLES = 4
_JUDGE_COLORS = {"endpoint": BLUE, "reward": GREEN, "checker": PINK}


def judgements_panel(analysis: SweepAnalysis) -> Panel | None:
    """Return win rates with intervals, the table of judgements, and examples of judged answers."""
    judgements = [(trial, judgement) for trial in analysis.frame.judged for judgement in trial.judgements]
    if not judgements:
        return None
    blocks: list[Block] = [_chart(judgements), _table(judgements)]
    blocks += [Paragraph(text) for text in _remarks([judgement for _, judgement in judgements])]
    blocks += _examples(analysis)
    lead = (
        "Answers to fixed prompts, the trial's against the initial model's. Ties count half. Each interval is of its "
        "trial by itself."
    )
    return Panel("judge", "Judgements", lead, blocks)


def _chart(judgements: list[tuple[TrialFrame, Judgement]]) -> Charts:
    with_rates = [
        (trial, judgement, judgement.win_rate) for trial, judgement in judgements if judgement.win_rate is not None
    ]
    names = [
        escape_text(f"trial {trial.label}, {judgement.judge}, {judgement.decoding}")
        for trial, judgement, _ in with_rates
    ]
    traces = [
        go.Scatter(
            x=[rate.value for _, _, rate in with_rates],
            y=names,
            mode="markers",
            marker={"size": 9, "color": [_JUDGE_COLORS[judgement.judge] for _, judgement, _ in with_rates]},
            error_x={
                "type": "data",
                "symmetric": False,
                "array": [rate.high - rate.value for _, _, rate in with_rates],
                "arrayminus": [rate.value - rate.low for _, _, rate in with_rates],
                "color": GREY,
            },
            hovertemplate="%{y}: %{x:.1%}<extra></extra>",
        ),
        go.Scatter(
            x=[
                None if judgement.lc_win_rate is None else judgement.lc_win_rate.value for _, judgement, _ in with_rates
            ],
            y=names,
            mode="markers",
            marker={"size": 11, "symbol": "diamond-open", "color": VERMILION},
            hovertemplate="%{y}: %{x:.1%} at equal length<extra></extra>",
        ),
    ]
    half = {
        "type": "line",
        "yref": "paper",
        "y0": 0,
        "y1": 1,
        "x0": 0.5,
        "x1": 0.5,
        "line": {"color": GREY, "width": 1},
    }
    made = figure(
        traces,
        shapes=[half],
        xaxis={"title": {"text": "win rate against the initial model"}, "range": [0, 1], "tickformat": ".0%"},
        yaxis={"autorange": "reversed", "automargin": True, "type": "category"},
        margin={"l": 8, "r": 14, "t": 6, "b": 46},
    )
    legend = tuple(
        (_JUDGE_COLORS[kind], kind)
        for kind in _JUDGE_COLORS
        if any(judgement.judge == kind for _, judgement, _ in with_rates)
    )
    chart = Chart(made, "", "Win rate of each judged trial, with its own 95 % interval", 110 + 34 * len(names))
    return Charts((chart,), (*legend, (VERMILION, "at equal length")), wide=True)


def _table(judgements: list[tuple[TrialFrame, Judgement]]) -> Table:
    extra = extra_rows([judgement for _, judgement in judgements])
    rows = tuple(
        (trial.label, *table_row(each)[1:], *more) for (trial, each), more in zip(judgements, extra, strict=True)
    )
    head = (*HEAD, *(name if name not in ("characters", "score") else f"{name} (initial)" for name in EXTRA_HEAD))
    return Table(head, rows, numeric=frozenset(set(range(len(head))) - {1, 2}))


def _remarks(judgements: list[Judgement]) -> list[str]:
    """Return notes on position bias, failed calls, unanswered questions and the length-controlled win rate."""
    found: list[str] = [conclusion] if (conclusion := joint_conclusion(judgements)) else []
    biased = [
        judgement
        for judgement in judgements
        if judgement.first_position_rate is not None and judgement.first_position_rate.is_clear
    ]
    if biased:
        shares = " and ".join(
            dict.fromkeys(
                f"{judgement.first_position_rate.value:.0%}"
                for judgement in biased
                if judgement.first_position_rate is not None
            )
        )
        found.append(
            f"The endpoint has a position bias: the answer shown first gets {shares} of the decided votes. Both orders "
            "were judged, so the bias leads to ties, not to wins."
        )
    failures: dict[str, int] = {}
    for judgement in judgements:
        for kind, count in (judgement.usage.failures if judgement.usage else {}).items():
            failures[kind] = failures.get(kind, 0) + count
    if failures:
        counts = ", ".join(f"{count} {kind.replace('_', ' ')}" for kind, count in sorted(failures.items()))
        found.append(f"Calls without a usable vote, retried where that could help: {counts}.")
    unanswered = sum(judgement.usage.unanswered for judgement in judgements if judgement.usage is not None)
    if unanswered:
        found.append(f"{unanswered} questions are still unanswered: run the same command again.")
    if any(judgement.lc_win_rate is not None for judgement in judgements):
        found.append(
            "At equal length: the length-controlled win rate of AlpacaEval 2, predicted by a logistic regression for "
            "answers of equal length."
        )
    if any(judgement.judge == "reward" for judgement in judgements):
        found.append(
            "A reward model that labeled the training data, or was trained on similar data, is not independent."
        )
    return found


def _examples(analysis: SweepAnalysis) -> list[Block]:
    """Return answers of the best judged trial that won and that lost against the initial model's."""
    trial = next(iter(analysis.frame.judged), None)
    first = None if trial is None else most_important(trial.judgements)
    if trial is None or first is None:
        return []
    blocks: list[Block] = []
    for example in first.examples[:_EXAMPLES]:
        preferred = example.preference > 0.5
        ours = ModelReply(f"trial {trial.label}{', preferred' if preferred else ''}", example.trial_answer, None)
        theirs = ModelReply(f"initial model{'' if preferred else ', preferred'}", example.initial_answer, None)
        blocks.append(Replies(example.prompt, None, (ours, theirs)))
    return blocks
