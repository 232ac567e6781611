"""First panels of the report: the best configuration and how sure it is, the setup, the findings.

The setup says enough to know whether two reports may be compared.
"""

from __future__ import annotations

from typing import Any

import yaml

from dashboards.analysis.param_effects import seed_groups
from dashboards.analysis.significance import Difference, Significance
from dashboards.analysis.small_samples import FEW_PAIRS
from dashboards.analysis.sweep_frame import (
    SweepFrame,
    TrialFrame,
    format_brief,
    format_counts,
    format_signed,
    format_value,
    state_counts,
)
from dashboards.diagnosis.diagnose import SweepAnalysis
from dashboards.diagnosis.findings import FindingLevel
from dashboards.report.blocks import Block, Code, Findings, KeyFigure, KeyFigures, Panel, Paragraph, Table
from orchestrator.judge.judgements import headline
from orchestrator.spec.loading.serialization import spec_hash
from trainer.config.trial import TrialConfig
from trainer.data.data_report import DataReport
from trainer.metrics import EVAL

MAX_LISTED = 10


def no_result_text(frame: SweepFrame) -> str:
    """Where a sweep stands of which no trial completed."""
    ends = state_counts(trial.record for trial in frame.trials)
    if not frame.trials:
        return "No trial has begun yet."
    if all(trial.record.state.finished for trial in frame.trials):
        return f"No trial completed: {format_counts(ends)}. The reasons are below."
    return f"No trial has completed yet; {ends.get('running', 0)} running."


def significance_text(frame: SweepFrame, significance: Significance) -> str:
    """Against the other trials, then against the initial model."""
    return f"{_against_trials_text(frame, significance)}{_against_initial_text(frame, significance)}"


def _against_initial_text(frame: SweepFrame, significance: Significance) -> str:
    against = significance.against_initial
    if against is None:
        return ""
    if frame.sign * against.mean <= 0:
        return " The winner is no better than the start model."
    if against.is_clear:
        return " The winner is clearly better than the start model."
    return " The winner is not clearly better than the start model: the 95 % interval of its gain includes 0."


def _against_trials_text(frame: SweepFrame, significance: Significance) -> str:
    if not significance.runners_up:
        others = len(frame.ranked) - 1
        if others:
            return (
                f"How sure the ranking is cannot be told: {frame.objective.metric} is no mean over held-out pairs, or "
                "the trials' pairs are gone. Run the best few again with other values of training.seed."
            )
        return "Only one trial completed: there is nothing to compare it with but the start model."
    how = (
        "bootstrap over the held-out pairs, all trials on the same ones"
        if significance.paired
        else "not paired, so too wide"
    )
    runner_up, difference = significance.runners_up[0]
    if len(significance.not_distinguishable) == 1:
        return (
            f"Trial {significance.winner.label} is better than every other: the runner-up, trial {runner_up.label}, is "
            f"behind by {format_brief(abs(difference.mean))} ({interval_text(difference)}; {how})."
        )
    count = len(significance.not_distinguishable)
    every = "The" if count == len(frame.ranked) else "These"
    listed = ", ".join(trial.label for trial in significance.not_distinguishable[:MAX_LISTED]) + (
        " and more" if count > MAX_LISTED else ""
    )
    return (
        f"{every} {count} configurations cannot be told apart: trials {listed}. The differences to the winner have "
        f"95 % intervals that include 0 ({how})."
    )


def interval_text(difference: Difference) -> str:
    """The 95 % interval in words."""
    return f"95 % interval {format_signed(difference.low)} … {format_signed(difference.high)}"


_FURTHER_METRICS = {
    f"{EVAL}margins/logp": "margin",
    f"{EVAL}logps_per_token/chosen": "chosen log-prob",
    f"{EVAL}exact_answers": "right answers",
}
"""Metric -> its column: the newest value, and its change since the start."""


def winner_panel(analysis: SweepAnalysis) -> Panel | None:
    """The winner, against the start and against the others."""
    frame, significance = analysis.frame, analysis.significance
    if significance is None:
        return Panel(
            "answer", "The answer", "", (Paragraph(no_result_text(frame), strong=True), *_no_winner_blocks(frame))
        )
    winner = significance.winner
    blocks: list[Block] = [
        KeyFigures(tuple(_key_figures(frame, significance))),
        Paragraph(significance_text(frame, significance), strong=True),
    ]
    blocks += [*_judgement_figure(frame), _health(analysis, significance.winner)]
    if frame.state != "finished" and not frame.sweeps:
        blocks.append(Paragraph(f"The sweep is {frame.state}: this is how it stands now, not its result."))
    blocks.append(_table(frame, significance))
    groups = seed_groups(frame)
    if groups:
        rows = tuple(
            (
                frame.describe_params(g.trials[0], g.paths),
                str(len(g.trials)),
                format_value(g.mean),
                f"± {format_value(g.spread)}",
            )
            for g in groups
        )
        blocks.append(Paragraph("Over seeds, the same configuration trained again (mean and standard deviation):"))
        head = ("configuration", "seeds", frame.objective.metric, "spread")
        blocks.append(Table(head, rows[:MAX_LISTED], frozenset({1, 2, 3})))
    blocks.append(Code("The winner's searched leaves", _yaml(_nested(dict(winner.record.params)))))
    blocks.append(
        Code("The winner as a whole trial: python -m trainer trial.yaml", config_yaml(winner.config), folded=True)
    )
    return Panel("answer", "The answer", "", blocks)


def _health(analysis: SweepAnalysis, winner: TrialFrame) -> Paragraph:
    """Whether anything speaks against the winner, in one line; the diagnosis has the evidence."""
    about = [finding for finding in analysis.findings if not finding.trials or winner.label in finding.trials]
    serious = [finding.title for finding in about if finding.level is FindingLevel.SERIOUS]
    if not serious:
        return Paragraph("The diagnosis has found nothing serious about it.")
    listed = "; ".join(title[:1].lower() + title[1:] for title in serious)
    return Paragraph(
        f"Not yet one to ship: {listed}. The diagnosis says what to do.", strong=True, level=FindingLevel.SERIOUS
    )


def _no_winner_blocks(frame: SweepFrame) -> list[Block]:
    start = frame.initial_value(frame.objective.metric)
    return (
        []
        if start is None
        else [KeyFigures((KeyFigure(f"start model, {frame.objective.metric}", format_value(start)),))]
    )


def _key_figures(frame: SweepFrame, significance: Significance) -> list[KeyFigure]:
    winner = significance.winner
    start = frame.initial_value(frame.objective.metric)
    total = f" of {frame.planned}" if frame.planned and frame.planned > len(frame.trials) else ""
    ends = format_counts(state_counts(trial.record for trial in frame.trials))
    value = format_brief(winner.record.value)
    found = [
        KeyFigure(f"best: trial {winner.label}", frame.describe_params(winner) or "the only configuration"),
        KeyFigure(frame.objective.metric, value, "" if start is None else f"{format_brief(start)} before training"),
    ]
    if significance.against_initial is not None:
        found.append(
            KeyFigure(
                "gain over the start model",
                format_signed(significance.against_initial.mean),
                interval_text(significance.against_initial),
            )
        )
    if significance.wins:
        share = significance.wins[winner.number]
        few = ", which are few" if significance.pairs <= FEW_PAIRS else ""
        found.append(
            KeyFigure("would win again", f"{share:.0%}", f"of redraws of {significance.pairs:,} held-out pairs{few}")
        )
    judgements = headline(winner.judgements)
    if judgements is not None and judgements.win_rate is not None:
        rate = judgements.win_rate
        interval = f"95 % interval {rate.low:.0%} … {rate.high:.0%}"
        by = f"{interval}, by {judgements.judge_label}, {judgements.decoding} answers"
        found.append(KeyFigure("answers preferred to the start model's", f"{rate.value:.0%}", by))
    found.append(KeyFigure("trials", f"{len(frame.trials)}{total}", ends))
    return found


def _judgement_figure(frame: SweepFrame) -> list[Block]:
    """The judge's judgement on the winner, and on a judged trial that does better in it."""
    with_rates = [
        (trial, v, v.win_rate) for trial in frame.ranked if (v := headline(trial.judgements)) and v.win_rate is not None
    ]
    if not with_rates:
        return []
    trial, judgement, rate = with_rates[0]
    text = f"Trial {trial.label} {judgement.summary}. "
    if not rate.is_clear:
        text += "By these prompts its answers cannot be told from the start model's."
    elif rate.value < 0.5:
        text += "The start model answers better: what training gained on the held-out pairs does not show in answers."
    else:
        text += "Its answers are clearly better than the start model's."
    same = [(c, v, r) for c, v, r in with_rates[1:] if (v.key, v.by) == (judgement.key, judgement.by)]
    better, _, by = max(same, key=lambda row: row[2].value, default=(trial, judgement, rate))
    if by.value > rate.value:
        text += f" Of the judged trials, trial {better.label} does best by this judge: {by.value:.0%}."
    return [Paragraph(text, strong=True)]


def _table(frame: SweepFrame, significance: Significance) -> Table:
    differences = {trial.number: difference for trial, difference in significance.runners_up}
    indistinguishable = {trial.number for trial in significance.not_distinguishable}
    further = [
        m for m in _FURTHER_METRICS if m != frame.objective.metric and any(c.last(m) is not None for c in frame.ranked)
    ]
    head = ["trial", frame.objective.metric.removeprefix(EVAL), *(frame.short_names.get(p, p) for p in frame.paths)]
    head += [
        "behind by (95 %)" + ("; ≈ not clearly" if len(significance.not_distinguishable) > 1 else ""),
        "would win",
        *(_FURTHER_METRICS[m] for m in further),
    ]
    rows: list[tuple[str, ...]] = []
    for trial in frame.ranked[:MAX_LISTED]:
        row_difference = differences.get(trial.number)
        row = [
            trial.label,
            format_brief(trial.record.value),
            *(format_value(trial.record.params.get(p)) for p in frame.paths),
        ]
        row += [
            "–"
            if row_difference is None
            else ("≈ " if trial.number in indistinguishable else "") + _behind(frame, row_difference)
        ]
        row += [f"{significance.wins[trial.number]:.0%}" if trial.number in significance.wins else "–"]
        row += [_with_change(trial, metric) for metric in further]
        rows.append(tuple(row))
    return Table(tuple(head), tuple(rows), numeric=frozenset(range(1, len(head))), marked=frozenset({0}))


def _behind(frame: SweepFrame, row_difference: Difference) -> str:
    """How far the runner-up is behind, whichever direction is better."""
    low, high = sorted((frame.sign * row_difference.low, frame.sign * row_difference.high))
    return f"{format_brief(frame.sign * row_difference.mean)} ({format_signed(low)} … {format_signed(high)})"


def _with_change(trial: TrialFrame, metric: str) -> str:
    change = trial.change(metric)
    return format_brief(trial.last(metric)) + ("" if change is None else f" ({format_signed(change)})")


def _nested(params: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in params.items():
        *groups, name = path.split(".")
        inner = tree
        for group in groups:
            inner = inner.setdefault(group, {})
        inner[name] = value
    return tree


def config_yaml(config: TrialConfig) -> str:
    """A trial's file."""
    return _yaml(config.model_dump(mode="json"))


def _yaml(tree: dict[str, Any]) -> str:
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True) if tree else "# nothing was searched\n"


def setup_panel(analysis: SweepAnalysis) -> Panel | None:
    """Model, data, training, search."""
    frame = analysis.frame
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
    steps = {trial.steps for trial in frame.trials if trial.steps is not None}
    rows += [
        ("updates a trial", ", ".join(map(str, sorted(steps))) or "not known yet"),
        ("pairs per update", str(base.training.pairs_per_update)),
        ("objective", base.loss.kind),
        ("goal", f"{frame.objective.direction} {frame.objective.metric}"),
        ("sampler", spec.sampler.kind),
    ]
    rows += [(path, ", ".join(format_value(v) for v in frame.space.listed_values(path))) for path in frame.paths]
    rows.append(("identity of the sweep", spec_hash(spec)[:12]))
    blocks: list[Block] = [Table(("", ""), tuple(rows)), *_found(frame.data)]
    blocks += [Paragraph(notice) for notice in frame.notices]
    return Panel("setup", "What was run", "", blocks)


def _found(data: DataReport | None) -> list[Block]:
    """What was found in the rows, by kind."""
    if data is None or not data.findings:
        return []
    rows = tuple((f.kind, f.severity.replace("_", " "), f"{f.count:,}", str(f)) for f in data.findings)
    head = Paragraph("What was found in the data, counted by row:")
    return [head, Table(("kind", "weight", "rows", "what"), rows, numeric=frozenset({2}))]


def diagnosis_panel(analysis: SweepAnalysis) -> Panel | None:
    """The findings, the weightiest first."""
    if not analysis.frame.trials:
        return None
    if not analysis.findings:
        over = all(trial.record.state.finished for trial in analysis.frame.trials)
        nothing = "No trial completed, so there is nothing to diagnose." if over else "Too early to say."
        what = "No rule found anything to object to." if analysis.frame.ranked else nothing
        return Panel("diagnosis", "Diagnosis", "", (Paragraph(what),))
    name = analysis.frame.name
    lead = "" if analysis.frame.sweeps else f"orchestrate suggest {name} writes a follow-up sweep that acts on it."
    return Panel("diagnosis", "Diagnosis", lead, (Findings(analysis.findings),))
