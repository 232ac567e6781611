"""Trial table for terminals of any width, final summary of a sweep, most serious findings of the diagnosis."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console, Group, RenderableType
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from dashboards.analysis.sweep_frame import TrialCurves, format_params, format_value, short_names
from dashboards.diagnosis.findings import Finding, FindingLevel
from dashboards.formatting import progress_bar, sparkline
from orchestrator.interfaces import UpdatesOf
from orchestrator.spec.objectives import Objective
from orchestrator.spec.sweep_spec import SweepSpec
from orchestrator.study.trial_records import TrialRecord, TrialState, pareto_front, rank_trials

_STYLE = {
    TrialState.QUEUED: "dim",
    TrialState.RUNNING: "cyan",
    TrialState.PAUSED: "blue",
    TrialState.COMPLETE: "green",
    TrialState.PRUNED: "yellow",
    TrialState.FAILED: "red",
}
MARGINS = "eval_margins/logp"
ACCURACIES = "eval_accuracies/logp"
_REASON_WIDTH = 30
"""Columns in which a reason can still be read."""


def state_text(curves: TrialCurves) -> Text:
    """The state in its color; a diverged trial is told from a hopeless one."""
    record = curves.record
    word = "DIVERGED" if record.diverged else str(record.state)
    return Text(word, style="magenta" if record.diverged else _STYLE[record.state])


def trial_table(
    all_curves: Sequence[TrialCurves],
    paths: Sequence[str],
    objective: Objective,
    *,
    steps: UpdatesOf | None,
    width: int,
    most_reasons: int | None = None,
) -> RenderableType:
    """One row a trial; on narrow terminals the reasons stand below, the newest `most_reasons` of them.

    `steps`: updates by params. Sparklines are as wide as there is room for, down to none.
    """
    reason = max((len(_remark(curves, False)) for curves in all_curves), default=0)
    roomy = _table(all_curves, paths, objective, steps, roomy=True, spark=12)
    if _table_width(roomy).maximum - max(0, reason - _REASON_WIDTH) <= width:
        return roomy
    tried = (
        _table(all_curves, paths, objective, steps, roomy=False, spark=spark, tight=spark < 6)
        for spark in (10, 6, 3, 0)
    )
    table = next((made for made in tried if _table_width(made).maximum <= width), None)
    if table is None:
        table = _folded_table(all_curves, paths, objective, steps, progress=True)
        if _table_width(table).minimum > width:
            table = _folded_table(all_curves, paths, objective, steps, progress=False)
    reasons = [v.record for v in all_curves if v.record.reason]
    if most_reasons is not None:
        reasons = reasons[max(0, len(reasons) - most_reasons) :] if most_reasons > 0 else []
    live = most_reasons is not None  # there a line is a line: what wraps would not fit
    lines = (Text(f"{r.number}: {r.reason}", no_wrap=live, overflow="ellipsis") for r in reasons)
    return Group(table, *lines)


def _table_width(table: Table) -> Measurement:
    console = Console(width=1000, height=100)  # both: on a dumb terminal rich goes by 80 columns else
    return Measurement.get(console, console.options, table)


def _table(
    all_curves: Sequence[TrialCurves],
    paths: Sequence[str],
    objective: Objective,
    steps: UpdatesOf | None,
    *,
    roomy: bool,
    spark: int,
    tight: bool = False,
) -> Table:
    """`tight`: names are broken over lines and columns stand closer; a value is never cut."""
    short = short_names(paths)
    best = next(iter(rank_trials([v.record for v in all_curves], objective)), None)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, expand=False, padding=(0, 0) if tight else (0, 1))
    table.add_column("trial", justify="right", no_wrap=True)
    table.add_column("state", no_wrap=True)
    for path in paths:
        table.add_column(_break_name(short[path]) if tight else short[path], justify="right", no_wrap=True)
    table.add_column("step" if not roomy else "progress", no_wrap=True)
    metric = objective.metric if roomy else objective.metric.removeprefix("eval_")
    table.add_column(_break_name(metric) if tight else metric, justify="right", no_wrap=True)
    if spark:
        table.add_column("margin" if roomy else "marg.", no_wrap=True)
        table.add_column("accuracy" if roomy else "acc.", no_wrap=True)
    if roomy:
        table.add_column("", overflow="fold")
    for curves in all_curves:
        first = best is not None and best is curves.record
        row = [Text(f"★ {curves.record.number}" if first else str(curves.record.number)), state_text(curves)]
        row += [Text(format_value(curves.record.params.get(path))) for path in paths]
        of = None if steps is None else steps(curves.record.params)
        row += [_progress(curves, of, roomy), _objective_cell(curves, objective, first)]
        if spark:
            row += [Text(sparkline(curves.values(MARGINS), spark), style="blue")]
            row += [Text(sparkline(curves.values(ACCURACIES), spark), style="green")]
        if roomy:
            row += [Text(_remark(curves, first))]
        table.add_row(*row)
    return table


def _break_name(name: str) -> str:
    """A name over several lines: learning_rate is two short words."""
    return name.replace("_", "_\n").replace("/", "/\n").replace(".", ".\n")


def _folded_table(
    all_curves: Sequence[TrialCurves],
    paths: Sequence[str],
    objective: Objective,
    steps: UpdatesOf | None,
    *,
    progress: bool,
) -> Table:
    """For more settings than there is room for: all of them in one column, over as many lines as they need."""
    best = next(iter(rank_trials([v.record for v in all_curves], objective)), None)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, expand=False, padding=(0, 0))
    metric = _break_name(objective.metric.removeprefix("eval_"))
    for name in ("trial", "state", "configuration", *(["step"] if progress else []), metric):
        table.add_column(name, no_wrap=name != "configuration", overflow="fold")
    for curves in all_curves:
        first = best is not None and best is curves.record
        of = None if steps is None else steps(curves.record.params)
        table.add_row(
            Text(f"★ {curves.record.number}" if first else str(curves.record.number)),
            state_text(curves),
            Text(format_params(curves.record.params, paths)),
            *([_progress(curves, of, roomy=False)] if progress else []),
            _objective_cell(curves, objective, first),
        )
    return table


def _progress(curves: TrialCurves, steps: int | None, roomy: bool) -> Text:
    if curves.record.state is TrialState.QUEUED:
        return Text("")
    if steps is None:
        return Text(str(curves.step))
    if not roomy:
        return Text(f"{curves.step}/{steps}")
    return Text(
        f"{progress_bar(curves.step / steps, 8)} {curves.step}/{steps}",
        style="dim" if curves.record.state.finished else "",
    )


def _objective_cell(curves: TrialCurves, objective: Objective, best: bool) -> Text:
    value = curves.record.value if curves.record.value is not None else curves.last(objective.metric)
    return Text("" if value is None else format_value(value), style="bold green" if best else "")


def _remark(curves: TrialCurves, best: bool) -> str:
    if best:
        return "best"
    if curves.record.reason:
        return curves.record.reason
    return f"attempt {curves.record.attempts}" if curves.record.attempts > 1 else ""


def print_final_summary(
    spec: SweepSpec, all_curves: Sequence[TrialCurves], console: Console, *, steps: UpdatesOf | None
) -> None:
    """The table of trials, the best configuration, and what to type next."""
    ordered = sorted(all_curves, key=lambda v: v.record.number)
    console.print(trial_table(ordered, spec.search.paths, spec.goal, steps=steps, width=console.size.width))
    ranked = rank_trials([v.record for v in ordered], *spec.objectives)
    if not ranked:
        over = bool(ordered) and all(v.record.state.finished for v in ordered)
        console.print(
            Text("No trial completed; the reasons are in the table.", style="red")
            if over
            else Text("No trial has completed yet.", style="yellow")
        )
        return
    if len(spec.objectives) > 1:
        _print_front(spec, pareto_front(ranked, spec.objectives), console)
        return
    best = ranked[0]
    console.print(
        Text("Best: ", style="bold").append(f"trial {best.number}", style="bold green")
        + Text(f"  {format_params(best.params, spec.search.paths)}  {spec.goal.metric}={format_value(best.value)}")
    )
    start = next((v.values(spec.goal.metric)[0] for v in ordered if v.values(spec.goal.metric)), None)
    if start is not None and best.value is not None:
        console.print(Text(f"The start model had {spec.goal.metric}={format_value(start)}.", style="dim"))


def _print_front(spec: SweepSpec, best: Sequence[TrialRecord], console: Console) -> None:
    """Of several objectives no trial is the best: those that no other one beats in all of them."""
    console.print(Text(f"The Pareto front of {len(spec.objectives)} goals:", style="bold"))
    for record in best:
        objective_values = zip(spec.objectives, record.values or (), strict=True)
        values = "  ".join(f"{objective.metric}={format_value(value)}" for objective, value in objective_values)
        console.print(
            Text(f"  trial {record.number}", style="bold green")
            + Text(f"  {format_params(record.params, spec.search.paths)}  {values}")
        )


_FINDING_STYLE = {FindingLevel.SERIOUS: "bold red", FindingLevel.WARNING: "yellow", FindingLevel.NOTE: "cyan"}
_MAX_FINDINGS = 4


def print_findings(findings: Sequence[Finding], name: str, console: Console, *, most: int = _MAX_FINDINGS) -> None:
    """At most `most` findings, each with its next step, and how to act on them."""
    for finding in findings[:most]:
        head = Text(f"{finding.level}: ", style=_FINDING_STYLE[finding.level]).append(
            finding.title, style="bold not dim"
        )
        if console.is_terminal:
            console.print(head)
            console.print(Padding(Text(finding.next_step, style="dim"), (0, 0, 0, 2), expand=False))
        else:  # a line is a line
            console.print(head, soft_wrap=True)
            console.print(Text(f"  {finding.next_step}"), soft_wrap=True)
    if len(findings) > most:
        console.print(Text(f"and {len(findings) - most} more in the report", style="dim"))
    if findings:
        console.print(Text(f"A follow-up sweep that acts on this: orchestrate suggest {name}"))
