"""Panels of the winner with its significance, of the diagnosis, and of the setup.

The setup lists what must be equal for two reports to be comparable.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import yaml

from dashboards.analysis.param_effects import seed_groups
from dashboards.analysis.significance import Significance, candidate_count, recommend
from dashboards.analysis.simultaneous_intervals import Difference
from dashboards.analysis.small_samples import SMALL_SAMPLE_PAIRS
from dashboards.analysis.sweep_frame import SweepFrame, TrialFrame, state_counts
from dashboards.diagnosis.diagnose import SweepAnalysis
from dashboards.diagnosis.findings import NO_DIAGNOSIS, FindingLevel, lower_first, reasons_not_to_use
from dashboards.formatting import (
    format_brief,
    format_changes,
    format_counts,
    format_intervals,
    format_measured,
    format_settings,
    format_signed,
    format_value,
    objectives_text,
)
from dashboards.report.blocks import Block, Code, Findings, KeyFigure, KeyFigures, Panel, Paragraph, Table
from dashboards.report.panels.finalists_panel import confirmed_figures
from orchestrator.judge.judgements import most_important
from orchestrator.judge.win_rates import joint_win_rate
from orchestrator.spec.loading.serialization import sweep_identity
from trainer.config.trial import TrialConfig
from trainer.data.data_report import DataReport
from trainer.metrics import CHOSEN, EVAL_PREFIX, EXACT_ANSWERS, KL, MARGIN

MAX_LISTED = 10


def no_result_text(frame: SweepFrame) -> str:
    """Return one sentence on the state of a sweep without a best trial."""
    if frame.ranked:
        return f"{frame.requirements_text}."
    ends = state_counts(trial.record for trial in frame.all_trials)
    if not frame.trials:
        return "No trial has started yet."
    if all(trial.record.state.is_final for trial in frame.trials):
        return f"No trial completed: {format_counts(ends)}. The reasons are below."
    now = "running" if frame.state in ("running", "paused") else "interrupted"
    return f"No trial has completed yet; {ends.get('running', 0)} {now}."


def significance_text(frame: SweepFrame, significance: Significance, avoid: Container[str] = ()) -> str:
    """Return the significance in words: against the other trials, then against the initial model.

    With several objectives, first the Pareto front. Where finalists were compared, their result is the answer.
    `avoid`: labels of trials that are not to be used, of which none is recommended.
    """
    against = _against_initial_text(frame, significance)
    if frame.confirmation is not None:
        return f"Finalists: {frame.confirmation.text}{against if frame.confirmation.gain is None else ''}"
    found, compared = recommend(frame, significance, avoid), _against_trials_text(frame, significance)
    if frame.further_objectives:
        labels = [trial.label for trial in frame.pareto_front]
        listed = ", ".join(labels[:MAX_LISTED]) + (" and more" if len(labels) > MAX_LISTED else "")
        compared = f"By {frame.objective.metric} alone: {lower_first(compared)}"
        compared = f"Pareto front, which no other trial equals or beats in every objective: {listed}. {compared}"
    recommended = "" if found is None else f" Of these, trial {found[0].label} is recommended: {found[1]}."
    return f"{compared}{recommended}{against}"


def _against_initial_text(frame: SweepFrame, significance: Significance) -> str:
    against = significance.against_initial
    if against is None:
        return ""
    winner = f"In {frame.objective.metric} the winner" if frame.further_objectives else "The winner"
    if frame.sign * against.mean <= 0:
        return f" {winner} is no better than the initial model."
    chosen = _choice_text(frame)
    if against.is_clear:
        return f" {winner} is clearly better than the initial model{f' (counting {chosen})' if chosen else ''}."
    counted = f", which counts {chosen}," if chosen else ""
    return f" {winner} is not clearly better than the initial model: the 95 % interval of its gain{counted} includes 0."


def _choice_text(frame: SweepFrame) -> str:
    """Return what the interval of the winner's gain counts besides the pairs; "" for a single trial."""
    count = candidate_count(frame)
    return f"that it was chosen among {count} trials" if count > 1 else ""


def _against_trials_text(frame: SweepFrame, significance: Significance) -> str:
    if not significance.runners_up:
        others = len(frame.eligible) - 1
        if others:
            return (
                f"The significance of the ranking is unknown: {frame.objective.metric} is not a mean over held-out "
                "pairs, or the trials' pairs were deleted. Repeat the best trials with other seeds (repeats: 3)."
            )
        return "Only one trial completed: it can only be compared with the initial model."
    method = "paired bootstrap over the held-out pairs" if significance.paired else "unpaired, therefore wider"
    if significance.runners_up[0][1].comparisons > 1:
        method += f", for all {significance.runners_up[0][1].comparisons:,} pairs of trials together"
    runner_up, difference = significance.runners_up[0]
    if len(significance.not_distinguishable) == 1:
        return (
            f"Trial {significance.winner.label} is better than all others: the runner-up, trial {runner_up.label}, is "
            f"behind by {format_brief(abs(difference.mean))} ({interval_text(difference)}; {method})."
        )
    count = len(significance.not_distinguishable)
    every = "The" if count == len(frame.eligible) else "These"
    listed = ", ".join(trial.label for trial in significance.not_distinguishable[:MAX_LISTED]) + (
        " and more" if count > MAX_LISTED else ""
    )
    return (
        f"{every} {count} configurations are not distinguishable, which is a tie: trials {listed}. The 95 % intervals "
        f"of their differences to the winner include 0 ({method})."
    )


def interval_text(difference: Difference) -> str:
    """Format as `95 % interval -0.01 … +0.03`: the joint one, on which conclusions rest."""
    return f"95 % interval {format_signed(difference.joint_low)} … {format_signed(difference.joint_high)}"


_FURTHER_METRICS = {
    MARGIN: "margin",
    CHOSEN: "chosen log-prob",
    EXACT_ANSWERS: "right answers",
    KL: "KL per token",
}
"""Metric -> column that shows its newest value and the change since step 0, of the KL divergence 0."""


def winner_panel(analysis: SweepAnalysis) -> Panel | None:
    """Return the winner, its significance, its health and the ranking."""
    frame, significance = analysis.frame, analysis.significance
    if significance is None:
        without = [Paragraph(no_result_text(frame), strong=True), *_no_winner_blocks(frame), *_broken_blocks(frame)]
        return Panel("answer", "Result", "", without)
    winner = significance.winner
    blocks: list[Block] = [
        KeyFigures(tuple(_key_figures(frame, significance))),
        Paragraph(significance_text(frame, significance, trials_to_avoid(analysis)), strong=True),
    ]
    blocks += [*_judgement_figure(frame), _health(analysis, significance.winner)]
    if frame.state != "finished" and not frame.sweeps:
        blocks.append(Paragraph(f"The sweep is {frame.state}: these are preliminary results."))
    blocks.append(_table(frame, significance))
    if frame.requirements_text:
        blocks += [Paragraph(f"{frame.requirements_text}."), *_broken_blocks(frame)]
    groups = seed_groups(frame)
    if groups:
        listed = groups[:MAX_LISTED]
        means, spreads = format_measured([g.mean for g in listed]), format_measured([g.spread for g in listed], 2)
        ends = iter(format_measured([end for g in listed if g.interval is not None for end in g.interval]))
        rows = tuple(
            (
                frame.describe_params(g.trials[0], g.paths),
                str(len(g.trials)),
                means[k],
                f"± {spreads[k]}",
                "–" if g.interval is None else f"{next(ends)} … {next(ends)}",
            )
            for k, g in enumerate(listed)
        )
        about = "Mean, standard deviation and 95 % t interval over seeds of the same configuration, each by itself:"
        blocks.append(Paragraph(about))
        head = ("configuration", "seeds", frame.objective.metric, "standard deviation", "95 % interval")
        blocks.append(Table(head, rows, frozenset({1, 2, 3, 4})))
    blocks.append(Code("The winner's searched settings", _yaml(_nested(dict(winner.record.params)))))
    blocks.append(
        Code(
            "The winner's complete configuration: python -m trainer trial.yaml", config_yaml(winner.config), folded=True
        )
    )
    return Panel("answer", "Result", "", blocks)


def trials_to_avoid(analysis: SweepAnalysis) -> frozenset[str]:
    """Return the labels of the trials that a serious finding warns of."""
    labels = [trial.label for trial in analysis.frame.trials]
    return frozenset(label for label in labels if reasons_not_to_use(analysis.findings, label))


def _health(analysis: SweepAnalysis, winner: TrialFrame) -> Paragraph:
    """Return one line with the serious findings about the winner; the diagnosis panel has the evidence."""
    if analysis.is_rehearsal:
        return Paragraph(f"{NO_DIAGNOSIS} Do not use its models.", strong=True, level=FindingLevel.SERIOUS)
    reasons = reasons_not_to_use(analysis.findings, winner.label)
    if not reasons:
        return Paragraph("The diagnosis has no serious finding about this trial.")
    where = "ranking" if analysis.frame.sweeps else "diagnosis"
    return Paragraph(
        f"Do not use this trial yet: {'; '.join(reasons)}. The next steps are in the {where}.",
        strong=True,
        level=FindingLevel.SERIOUS,
    )


def _no_winner_blocks(frame: SweepFrame) -> list[Block]:
    found = tuple(
        KeyFigure(f"initial model, {objective.metric}", format_value(start))
        for objective in frame.objectives
        if (start := frame.initial_value(objective.metric)) is not None
    )
    return [KeyFigures(found)] if found else []


def _key_figures(frame: SweepFrame, significance: Significance) -> list[KeyFigure]:
    winner = significance.winner
    start = frame.initial_value(frame.objective.metric)
    planned = f" of {frame.planned}" if frame.planned and frame.planned > len(frame.all_trials) else ""
    ends = format_counts(state_counts(trial.record for trial in frame.all_trials))
    value = format_brief(winner.record.value)
    found = [
        KeyFigure(
            f"{'first of the Pareto front' if frame.further_objectives else 'best'}: trial {winner.label}",
            frame.describe_params(winner) or "the only configuration",
        ),
        KeyFigure(
            frame.objective.metric,
            value,
            "; ".join(
                text
                for text in (
                    "" if start is None else f"{format_brief(start)} before training",
                    winner.record.seeds_text,
                )
                if text
            ),
        ),
        *_further_figures(frame, winner),
    ]
    found += confirmed_figures(frame)
    confirmed_gain = None if frame.confirmation is None else frame.confirmation.gain
    if significance.against_initial is not None and confirmed_gain is None:
        count = significance.against_initial.comparisons
        found.append(
            KeyFigure(
                "gain over the initial model",
                format_signed(significance.against_initial.mean),
                interval_text(significance.against_initial)
                + (f", for the best of {count} trials" if count > 1 else ""),
            )
        )
    if significance.first_place_shares and len(frame.eligible) > 1:
        share = significance.first_place_shares[winner.number]
        few = " (few)" if significance.pair_count <= SMALL_SAMPLE_PAIRS else ""
        found.append(
            KeyFigure(
                "ranks first",
                f"{share:.0%}",
                f"of bootstrap resamples of {significance.pair_count:,} held-out pairs{few}",
            )
        )
    judgement = most_important(winner.judgements)
    if judgement is not None and judgement.win_rate is not None:
        rate = judgement.win_rate
        interval = f"95 % interval {rate.low:.0%} … {rate.high:.0%}"
        by = f"{interval}, by {judgement.judge_label}, {judgement.decoding} answers"
        found.append(KeyFigure("answers preferred to the initial model's", f"{rate.value:.0%}", by))
    found.append(KeyFigure("trials", f"{len(frame.all_trials)}{planned}", ends))
    return found


def _further_figures(frame: SweepFrame, winner: TrialFrame) -> list[KeyFigure]:
    """Return the winner's value of each further objective, beside the initial model's."""
    found: list[KeyFigure] = []
    for objective in frame.further_objectives:
        start = frame.initial_value(objective.metric)
        note = f"{objective.direction}" + ("" if start is None else f"; {format_brief(start)} before training")
        found.append(KeyFigure(objective.metric, format_brief(frame.objective_value(winner, objective)), note))
    return found


def _judgement_figure(frame: SweepFrame) -> list[Block]:
    """Return the judgement of the best judged trial, and of a judged trial with a higher win rate."""
    with_rates = [
        (trial, judgement, judgement.win_rate)
        for trial in frame.judged
        if (judgement := most_important(trial.judgements)) and judgement.win_rate is not None
    ]
    if not with_rates:
        return []
    trial, judgement, rate = with_rates[0]
    text = f"Trial {trial.label} {judgement.summary}. "
    judged = [each for t in frame.judged for each in t.judgements]
    joint, candidates = joint_win_rate(judgement, judged)
    if candidates > 1:
        text += f"For all {candidates} judged trials together the interval is {joint.low:.0%} … {joint.high:.0%}. "
    if not joint.is_clear:
        text += "On these prompts its answers are not distinguishable from the initial model's."
    elif rate.value < 0.5:
        text += "The initial model's answers are better: the gain on the held-out pairs does not show in the answers."
    else:
        text += "Its answers are clearly better than the initial model's."
    same = [
        (trial, other, other_rate)
        for trial, other, other_rate in with_rates[1:]
        if (other.key, other.judge_name) == (judgement.key, judgement.judge_name)
    ]
    better, _, by = max(same, key=lambda row: row[2].value, default=(trial, judgement, rate))
    if by.value > rate.value:
        text += f" Of the judged trials, trial {better.label} has the highest win rate by this judge: {by.value:.0%}."
    return [Paragraph(text, strong=True)]


def _table(frame: SweepFrame, significance: Significance) -> Table:
    differences = {trial.number: difference for trial, difference in significance.runners_up}
    indistinguishable = {trial.number for trial in significance.not_distinguishable}
    further = [
        m
        for m in _FURTHER_METRICS
        if m != frame.objective.metric and any(trial.last(m) is not None for trial in frame.eligible)
    ]
    further = [m for m in further if all(m != objective.metric for objective in frame.further_objectives)]
    shown = frame.eligible[:MAX_LISTED]
    head = ["trial", *(objective.metric.removeprefix(EVAL_PREFIX) for objective in frame.objectives)]
    head += [frame.short_names.get(p, p) for p in frame.paths]
    values = [format_measured([frame.objective_value(trial, each) for trial in shown], 3) for each in frame.objectives]
    settings = [format_settings([trial.record.params.get(p) for trial in shown]) for p in frame.paths]
    head += [
        "behind by (95 %, each by itself)" + ("; ≈ not clearly" if len(significance.not_distinguishable) > 1 else ""),
        "ranks first",
        *(_FURTHER_METRICS[m] for m in further),
    ]
    behind = format_intervals([_behind(frame, differences.get(trial.number)) for trial in shown])
    changes = [
        format_changes([t.last(m) for t in shown], [None if m == KL else t.change(m) for t in shown]) for m in further
    ]
    rows: list[tuple[str, ...]] = []
    for k, trial in enumerate(shown):
        row = [trial.label, *(column[k] for column in (*values, *settings))]
        is_close = trial.number in differences and trial.number in indistinguishable
        row.append(f"{'≈ ' if is_close else ''}{behind[k]}")
        row += [
            f"{significance.first_place_shares[trial.number]:.0%}"
            if trial.number in significance.first_place_shares
            else "–"
        ]
        row += [column[k] for column in changes]
        rows.append(tuple(row))
    return Table(tuple(head), tuple(rows), numeric=frozenset(range(1, len(head))), marked=frozenset({0}))


def _broken_blocks(frame: SweepFrame) -> list[Block]:
    """Return the table of the complete trials that break a requirement, the nearest to keep all first."""
    broken = [trial for trial in frame.ranked if not trial.record.keeps_requirements][:MAX_LISTED]
    if not broken:
        return []
    head = ["trial", *(objective.metric.removeprefix(EVAL_PREFIX) for objective in frame.objectives)]
    head += [*(frame.short_names.get(p, p) for p in frame.paths), "breaks"]
    values = [format_measured([frame.objective_value(trial, each) for trial in broken], 3) for each in frame.objectives]
    settings = [format_settings([trial.record.params.get(p) for trial in broken]) for p in frame.paths]
    rows = [
        (trial.label, *(column[k] for column in (*values, *settings)), "; ".join(trial.record.breaks))
        for k, trial in enumerate(broken)
    ]
    return [Table(tuple(head), tuple(rows), numeric=frozenset(range(1, len(head) - 1)))]


def _behind(frame: SweepFrame, difference: Difference | None) -> tuple[float, float, float] | None:
    """Return the distance to the winner, positive for either direction of the objective, and its interval."""
    if difference is None:
        return None
    low, high = sorted((frame.sign * difference.low, frame.sign * difference.high))
    return frame.sign * difference.mean, low, high


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
    """Return a trial's configuration file."""
    return _yaml(config.model_dump(mode="json"))


def _yaml(tree: dict[str, Any]) -> str:
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True) if tree else "# nothing was searched\n"


def setup_panel(analysis: SweepAnalysis) -> Panel | None:
    """Return a table of model, data, training and search."""
    frame = analysis.frame
    if frame.sweeps:
        return None
    base, spec = frame.spec.base, frame.spec
    generated = base.model.generated
    model = base.model.name_or_path or (f"a generated {generated.architecture}" if generated else "?")
    rows: list[tuple[str, str]] = [
        ("initial model", f"{model}{' after the sft stage' if spec.sft else ''}, {base.model.dtype}"),
        ("weights trained", "LoRA" if base.lora else "all"),
    ]
    if frame.data is not None:
        rows.append(("pairs", f"{frame.data.train_rows:,} to train on, {frame.data.eval_rows:,} held out"))
        rows.append(("data", ", ".join(dict.fromkeys(source.name for source in frame.data.sources))))
        rows.append(("data fingerprint", frame.data.fingerprint))
        left = f"{frame.data.bad_rows:,} bad, {frame.data.dropped_rows:,} for other reasons"
        rows.append(("rows left out", f"{left} (see below)" if frame.data.findings else left))
    planned = {trial.planned_updates for trial in frame.trials if trial.planned_updates is not None}
    rows += [
        ("updates per trial", ", ".join(map(str, sorted(planned))) or "not known yet"),
        ("pairs per update", str(base.training.pairs_per_update)),
        ("loss", base.loss.kind),
        ("objective", objectives_text(frame.objectives)),
        ("sampler", spec.sampler.kind),
    ]
    rows += [(path, ", ".join(format_value(v) for v in frame.space.listed_values(path))) for path in frame.paths]
    rows.append(("hash of the sweep file", sweep_identity(spec)[:12]))
    blocks: list[Block] = [Table(("", ""), tuple(rows)), *_found(frame.data)]
    blocks += [Paragraph(notice) for notice in frame.notices]
    return Panel("setup", "Setup", "", blocks)


def _found(data: DataReport | None) -> list[Block]:
    """Return a table of the data findings, by kind."""
    if data is None or not data.findings:
        return []
    rows = tuple((f.kind, f.severity.replace("_", " "), f"{f.count:,}", str(f)) for f in data.findings)
    head = Paragraph("Findings in the data, counted by row:")
    return [head, Table(("kind", "severity", "rows", "finding"), rows, numeric=frozenset({2}))]


def diagnosis_panel(analysis: SweepAnalysis) -> Panel | None:
    """Return the findings, most serious first."""
    if not analysis.frame.trials:
        return None
    if analysis.is_rehearsal:
        return Panel("diagnosis", "Diagnosis", "", (Paragraph(NO_DIAGNOSIS),))
    if not analysis.findings:
        over = all(trial.record.state.is_final for trial in analysis.frame.trials)
        nothing = "No trial completed, so there is nothing to diagnose." if over else "No trial is complete yet."
        text = "No findings." if analysis.frame.ranked else nothing
        return Panel("diagnosis", "Diagnosis", "", (Paragraph(text),))
    lead = f"orchestrate suggest {analysis.frame.name} writes a follow-up sweep based on these findings."
    lead = "" if analysis.frame.sweeps or analysis.frame.is_out_of_reach else lead
    return Panel("diagnosis", "Diagnosis", lead, (Findings(analysis.findings),))
