"""What a judge says of the best trials' answers against the start model's."""

from __future__ import annotations

import plotly.graph_objects as go

from dashboards.analysis.sweep_frame import TrialCase
from dashboards.diagnosis.diagnose import Insight
from dashboards.report.blocks import Block, Chart, Charts, Panel, Replies, Reply, Table, Words
from dashboards.report.figures import BLUE, GREEN, GREY, PINK, VERMILION, figure, plain
from dashboards.terminal.judge_output import HEAD, MORE, more, row
from orchestrator.judge.judgements import Verdict, headline

_EXAMPLES = 4
_COLOURS = {"endpoint": BLUE, "reward": GREEN, "checker": PINK}


def panel(seen: Insight) -> Panel | None:
    """Win rates with their intervals, the table, and examples of what was preferred."""
    judged = [(case, verdict) for case in seen.frame.ranked for verdict in case.judged]
    if not judged:
        return None
    blocks: list[Block] = [_chart(judged), _table(judged)]
    blocks += [Words(text) for text in _remarks([verdict for _, verdict in judged])]
    blocks += _examples(seen)
    lead = "Answers to fixed prompts, the trial's against the start model's. Ties count half."
    return Panel("judge", "What a judge says", lead, blocks)


def _chart(judged: list[tuple[TrialCase, Verdict]]) -> Charts:
    told = [(case, v, v.win_rate) for case, v in judged if v.win_rate is not None]
    names = [plain(f"trial {case.label}, {v.judge}, {v.decoding}") for case, v, _ in told]
    traces = [
        go.Scatter(
            x=[rate.value for _, _, rate in told],
            y=names,
            mode="markers",
            marker={"size": 9, "color": [_COLOURS[v.judge] for _, v, _ in told]},
            error_x={
                "type": "data",
                "symmetric": False,
                "array": [rate.high - rate.value for _, _, rate in told],
                "arrayminus": [rate.value - rate.low for _, _, rate in told],
                "color": GREY,
            },
            hovertemplate="%{y}: %{x:.1%}<extra></extra>",
        ),
        go.Scatter(
            x=[None if v.lc_win_rate is None else v.lc_win_rate.value for _, v, _ in told],
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
        xaxis={"title": {"text": "win rate against the start model"}, "range": [0, 1], "tickformat": ".0%"},
        yaxis={"autorange": "reversed", "automargin": True, "type": "category"},
        margin={"l": 8, "r": 14, "t": 6, "b": 46},
    )
    legend = tuple((_COLOURS[kind], kind) for kind in _COLOURS if any(v.judge == kind for _, v, _ in told))
    chart = Chart(made, "", "Win rate of each judged trial, with its 95 % interval", 110 + 34 * len(names))
    return Charts((chart,), (*legend, (VERMILION, "at equal length")), wide=True)


def _table(judged: list[tuple[TrialCase, Verdict]]) -> Table:
    rows = tuple((case.label, *row(verdict)[1:], *more(verdict)) for case, verdict in judged)
    head = (*HEAD, *(name if name not in ("characters", "score") else f"{name} (start's)" for name in MORE))
    return Table(head, rows, numeric=frozenset(set(range(len(head))) - {1, 2}))


def _remarks(verdicts: list[Verdict]) -> list[str]:
    """What has to be known to read the table."""
    found: list[str] = []
    biased = [v for v in verdicts if v.first is not None and v.first.clear]
    if biased:
        shares = " and ".join(dict.fromkeys(f"{v.first.value:.0%}" for v in biased if v.first is not None))
        found.append(
            f"The endpoint has a position bias: the answer shown first gets {shares} of the decided votes. Both orders "
            "were asked, so the bias makes ties and not winners."
        )
    failures: dict[str, int] = {}
    for verdict in verdicts:
        for kind, count in (verdict.asked.failures if verdict.asked else {}).items():
            failures[kind] = failures.get(kind, 0) + count
    if failures:
        told = ", ".join(f"{count} {kind.replace('_', ' ')}" for kind, count in sorted(failures.items()))
        found.append(f"Calls without a verdict, tried again where that could help: {told}.")
    still_open = sum(v.asked.unanswered for v in verdicts if v.asked is not None)
    if still_open:
        found.append(f"{still_open} questions are still open: the same command asks them again.")
    if any(v.lc_win_rate is not None for v in verdicts):
        found.append(
            "At equal length: the length-controlled win rate of AlpacaEval 2, what a logistic regression expects where "
            "both answers are as long."
        )
    if any(v.judge == "reward" for v in verdicts):
        found.append("A reward model that the trials' data were made with, or was trained on the like, is no outsider.")
    return found


def _examples(seen: Insight) -> list[Block]:
    """Answers of the best judged trial that its judge liked and disliked."""
    case = next((case for case in seen.frame.ranked if case.judged), None)
    first = None if case is None else headline(case.judged)
    if case is None or first is None:
        return []
    blocks: list[Block] = []
    for example in first.examples[:_EXAMPLES]:
        preferred = example.preference > 0.5
        ours = Reply(f"trial {case.label}{', preferred' if preferred else ''}", example.ours, None)
        theirs = Reply(f"start model{'' if preferred else ', preferred'}", example.theirs, None)
        blocks.append(Replies(example.prompt, None, (ours, theirs)))
    return blocks
