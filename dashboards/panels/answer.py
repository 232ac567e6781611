"""The answer first: which configuration, how good, how sure."""

from __future__ import annotations

from typing import Any

import yaml

from dashboards.blocks import Block, Code, Fact, Facts, Panel, Table, Words
from dashboards.certainty import Certainty, Difference
from dashboards.diagnosis.finding import Level
from dashboards.frame import brief, endings, show, signed, told
from dashboards.insight import Insight
from dashboards.seeds import seed_groups
from dashboards.small_samples import FEW_PAIRS
from dashboards.sureness import LISTED, how_sure, interval, nothing_yet
from dashboards.sweep_frame import SweepFrame, TrialCase
from orchestrator.judging.verdict import headline
from trainer.config import TrialConfig
from trainer.metrics import EVAL

_BESIDE = {
    f"{EVAL}margins/logp": "margin",
    f"{EVAL}logps_per_token/chosen": "chosen log-prob",
    f"{EVAL}exact_answers": "right answers",
}
"""Metric -> its column: the newest value, and its change since the start."""


def panel(seen: Insight) -> Panel | None:
    """The winner, against the start and against the others."""
    frame, sure = seen.frame, seen.sure
    if sure is None:
        return Panel("answer", "The answer", "", (Words(nothing_yet(frame), strong=True), *_standing(frame)))
    winner = sure.winner
    blocks: list[Block] = [Facts(tuple(_facts(frame, sure))), Words(how_sure(frame, sure), strong=True)]
    blocks += [*_judged(frame), _health(seen, sure.winner)]
    if frame.state != "finished" and not frame.sweeps:
        blocks.append(Words(f"The sweep is {frame.state}: this is how it stands now, not its result."))
    blocks.append(_table(frame, sure))
    groups = seed_groups(frame)
    if groups:
        rows = tuple(
            (frame.words(g.cases[0], g.paths), str(len(g.cases)), show(g.mean), f"± {show(g.spread)}") for g in groups
        )
        blocks.append(Words("Over seeds, the same configuration trained again (mean and standard deviation):"))
        head = ("configuration", "seeds", frame.goal.metric, "spread")
        blocks.append(Table(head, rows[:LISTED], frozenset({1, 2, 3})))
    blocks.append(Code("The winner's searched leaves", _yaml(_nested(dict(winner.record.params)))))
    blocks.append(Code("The winner as a whole trial: python -m trainer trial.yaml", whole(winner.config), folded=True))
    return Panel("answer", "The answer", "", blocks)


def _health(seen: Insight, winner: TrialCase) -> Words:
    """Whether anything speaks against the winner, in one line; the diagnosis has the evidence."""
    about = [finding for finding in seen.findings if not finding.trials or winner.label in finding.trials]
    serious = [finding.title for finding in about if finding.level is Level.SERIOUS]
    if not serious:
        return Words("The diagnosis has found nothing serious about it.")
    listed = "; ".join(title[:1].lower() + title[1:] for title in serious)
    return Words(f"Not yet one to ship: {listed}. The diagnosis says what to do.", strong=True, level=Level.SERIOUS)


def _standing(frame: SweepFrame) -> list[Block]:
    start = frame.start(frame.goal.metric)
    return [] if start is None else [Facts((Fact(f"start model, {frame.goal.metric}", show(start)),))]


def _facts(frame: SweepFrame, sure: Certainty) -> list[Fact]:
    winner = sure.winner
    start = frame.start(frame.goal.metric)
    total = f" of {frame.planned}" if frame.planned and frame.planned > len(frame.trials) else ""
    ends = told(endings(case.record for case in frame.trials))
    value = brief(winner.record.value)
    found = [
        Fact(f"best: trial {winner.label}", frame.words(winner) or "the only configuration"),
        Fact(frame.goal.metric, value, "" if start is None else f"{brief(start)} before training"),
    ]
    if sure.against_start is not None:
        found.append(Fact("gain over the start model", signed(sure.against_start.mean), interval(sure.against_start)))
    if sure.wins:
        share = sure.wins[winner.number]
        few = ", which are few" if sure.pairs <= FEW_PAIRS else ""
        found.append(Fact("would win again", f"{share:.0%}", f"of redraws of {sure.pairs:,} held-out pairs{few}"))
    judged = headline(winner.judged)
    if judged is not None and judged.win_rate is not None:
        rate = judged.win_rate
        by = f"95 % interval {rate.low:.0%} … {rate.high:.0%}, by {judged.who}, {judged.decoding} answers"
        found.append(Fact("answers preferred to the start model's", f"{rate.value:.0%}", by))
    found.append(Fact("trials", f"{len(frame.trials)}{total}", ends))
    return found


def _judged(frame: SweepFrame) -> list[Block]:
    """The judge's verdict on the winner, and on a judged trial that does better in it."""
    told = [(case, v, v.win_rate) for case in frame.ranked if (v := headline(case.judged)) and v.win_rate is not None]
    if not told:
        return []
    case, verdict, rate = told[0]
    words = f"Trial {case.label} {verdict.in_words}. "
    if not rate.clear:
        words += "By these prompts its answers cannot be told from the start model's."
    elif rate.value < 0.5:
        words += "The start model answers better: what training gained on the held-out pairs does not show in answers."
    else:
        words += "Its answers are clearly better than the start model's."
    same = [(c, v, r) for c, v, r in told[1:] if (v.key, v.by) == (verdict.key, verdict.by)]
    better, _, by = max(same, key=lambda row: row[2].value, default=(case, verdict, rate))
    if by.value > rate.value:
        words += f" Of the judged trials, trial {better.label} does best by this judge: {by.value:.0%}."
    return [Words(words, strong=True)]


def _table(frame: SweepFrame, sure: Certainty) -> Table:
    gaps = {case.number: difference for case, difference in sure.rivals}
    tied = {case.number for case in sure.tied}
    beside = [m for m in _BESIDE if m != frame.goal.metric and any(c.last(m) is not None for c in frame.ranked)]
    head = ["trial", frame.goal.metric.removeprefix(EVAL), *(frame.short.get(p, p) for p in frame.paths)]
    head += [
        "behind by (95 %)" + ("; ≈ not clearly" if len(sure.tied) > 1 else ""),
        "would win",
        *(_BESIDE[m] for m in beside),
    ]
    rows: list[tuple[str, ...]] = []
    for case in frame.ranked[:LISTED]:
        gap = gaps.get(case.number)
        row = [case.label, brief(case.record.value), *(show(case.record.params.get(p)) for p in frame.paths)]
        row += ["–" if gap is None else ("≈ " if case.number in tied else "") + _behind(frame, gap)]
        row += [f"{sure.wins[case.number]:.0%}" if case.number in sure.wins else "–"]
        row += [_with_change(case, metric) for metric in beside]
        rows.append(tuple(row))
    return Table(tuple(head), tuple(rows), numeric=frozenset(range(1, len(head))), marked=frozenset({0}))


def _behind(frame: SweepFrame, gap: Difference) -> str:
    """How far the rival is behind, whichever direction is better."""
    low, high = sorted((frame.sign * gap.low, frame.sign * gap.high))
    return f"{brief(frame.sign * gap.mean)} ({signed(low)} … {signed(high)})"


def _with_change(case: TrialCase, metric: str) -> str:
    change = case.change(metric)
    return brief(case.last(metric)) + ("" if change is None else f" ({signed(change)})")


def _nested(params: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in params.items():
        *groups, leaf = path.split(".")
        inner = tree
        for group in groups:
            inner = inner.setdefault(group, {})
        inner[leaf] = value
    return tree


def whole(config: TrialConfig) -> str:
    """A trial's file."""
    return _yaml(config.model_dump(mode="json"))


def _yaml(tree: dict[str, Any]) -> str:
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True) if tree else "# nothing was searched\n"
