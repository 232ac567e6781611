"""The answer first: which configuration, how good, how sure.

How sure the answer is, in words.

What was run on what: enough to know whether two reports may be compared.

What is wrong or noteworthy, and what to do next.
"""

from __future__ import annotations

from typing import Any

import yaml

from dashboards.analysis.param_effects import seed_groups
from dashboards.analysis.significance import Certainty, Difference
from dashboards.analysis.small_samples import FEW_PAIRS
from dashboards.analysis.sweep_frame import SweepFrame, TrialCase, brief, endings, show, signed, told
from dashboards.diagnosis.diagnose import Insight
from dashboards.diagnosis.findings import Level
from dashboards.report.blocks import Block, Code, Fact, Facts, Findings, Panel, Table, Words
from orchestrator.judge.judgements import headline
from orchestrator.spec.loading.serialization import spec_hash
from trainer.config.trial import TrialConfig
from trainer.data.data_report import DataReport
from trainer.metrics import EVAL

LISTED = 10


def nothing_yet(frame: SweepFrame) -> str:
    """Where a sweep stands of which no trial completed."""
    ends = endings(case.record for case in frame.trials)
    if not frame.trials:
        return "No trial has begun yet."
    if all(case.record.state.finished for case in frame.trials):
        return f"No trial completed: {told(ends)}. The reasons are below."
    return f"No trial has completed yet; {ends.get('running', 0)} running."


def how_sure(frame: SweepFrame, sure: Certainty) -> str:
    """Against the other trials, then against the start model."""
    return f"{_among_trials(frame, sure)}{_over_start(frame, sure)}"


def _over_start(frame: SweepFrame, sure: Certainty) -> str:
    against = sure.against_start
    if against is None:
        return ""
    if frame.sign * against.mean <= 0:
        return " The winner is no better than the start model."
    if against.clear:
        return " The winner is clearly better than the start model."
    return " The winner is not clearly better than the start model: the 95 % interval of its gain includes 0."


def _among_trials(frame: SweepFrame, sure: Certainty) -> str:
    if not sure.rivals:
        others = len(frame.ranked) - 1
        if others:
            return (
                f"How sure the ranking is cannot be told: {frame.goal.metric} is no mean over held-out pairs, or the "
                "trials' pairs are gone. Run the best few again with other values of training.seed."
            )
        return "Only one trial completed: there is nothing to compare it with but the start model."
    how = "bootstrap over the held-out pairs, all trials on the same ones" if sure.paired else "not paired, so too wide"
    rival, difference = sure.rivals[0]
    if len(sure.tied) == 1:
        return (
            f"Trial {sure.winner.label} is better than every other: the runner-up, trial {rival.label}, is behind by "
            f"{brief(abs(difference.mean))} ({interval(difference)}; {how})."
        )
    count = len(sure.tied)
    every = "The" if count == len(frame.ranked) else "These"
    listed = ", ".join(case.label for case in sure.tied[:LISTED]) + (" and more" if count > LISTED else "")
    return (
        f"{every} {count} configurations cannot be told apart: trials {listed}. The differences to the winner have "
        f"95 % intervals that include 0 ({how})."
    )


def interval(difference: Difference) -> str:
    """The 95 % interval in words."""
    return f"95 % interval {signed(difference.low)} … {signed(difference.high)}"


_BESIDE = {
    f"{EVAL}margins/logp": "margin",
    f"{EVAL}logps_per_token/chosen": "chosen log-prob",
    f"{EVAL}exact_answers": "right answers",
}
"""Metric -> its column: the newest value, and its change since the start."""


def answer_panel(seen: Insight) -> Panel | None:
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


def setup_panel(seen: Insight) -> Panel | None:
    """Model, data, training, search."""
    frame = seen.frame
    if frame.sweeps:
        return None
    base, spec = frame.spec.base, frame.spec
    generated = base.model.generated
    model = base.model.name_or_path or (f"a generated {generated.architecture}" if generated else "?")
    rows: list[tuple[str, str]] = [
        ("start model", f"{model}{' after the sft stage' if spec.sft else ''}, {base.model.dtype}"),
        ("weights trained", "LoRA" if base.lora else "all"),
    ]
    if frame.data is not None:
        rows.append(("pairs", f"{frame.data.train_rows:,} to train on, {frame.data.eval_rows:,} held out"))
        rows.append(("data", ", ".join(dict.fromkeys(source.name for source in frame.data.sources))))
        rows.append(("data fingerprint", frame.data.fingerprint))
        left = f"{frame.data.bad_rows:,} bad, {frame.data.dropped_rows:,} for other reasons"
        rows.append(("rows left out", f"{left} (see below)" if frame.data.findings else left))
    steps = {case.steps for case in frame.trials if case.steps is not None}
    rows += [
        ("updates a trial", ", ".join(map(str, sorted(steps))) or "not known yet"),
        ("pairs per update", str(base.training.pairs_per_update)),
        ("objective", base.loss.kind),
        ("goal", f"{frame.goal.direction} {frame.goal.metric}"),
        ("sampler", spec.sampler.kind),
    ]
    rows += [(path, ", ".join(show(v) for v in frame.space.listed(path))) for path in frame.paths]
    rows.append(("identity of the sweep", spec_hash(spec)[:12]))
    blocks: list[Block] = [Table(("", ""), tuple(rows)), *_found(frame.data)]
    blocks += [Words(notice) for notice in frame.notices]
    return Panel("setup", "What was run", "", blocks)


def _found(data: DataReport | None) -> list[Block]:
    """What was found in the rows, by kind."""
    if data is None or not data.findings:
        return []
    rows = tuple((f.kind, f.severity.replace("_", " "), f"{f.count:,}", str(f)) for f in data.findings)
    head = Words("What was found in the data, counted by row:")
    return [head, Table(("kind", "weight", "rows", "what"), rows, numeric=frozenset({2}))]


def diagnosis_panel(seen: Insight) -> Panel | None:
    """The findings, the weightiest first."""
    if not seen.frame.trials:
        return None
    if not seen.findings:
        over = all(case.record.state.finished for case in seen.frame.trials)
        nothing = "No trial completed, so there is nothing to diagnose." if over else "Too early to say."
        what = "No rule found anything to object to." if seen.frame.ranked else nothing
        return Panel("diagnosis", "Diagnosis", "", (Words(what),))
    name = seen.frame.name
    lead = "" if seen.frame.sweeps else f"orchestrate suggest {name} writes a follow-up sweep that acts on it."
    return Panel("diagnosis", "Diagnosis", lead, (Findings(seen.findings),))
