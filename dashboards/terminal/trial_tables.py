"""Table of trials for any terminal width, final summary of a sweep, and its most serious findings."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from dashboards.analysis.sweep_frame import TrialCurves
from dashboards.diagnosis.findings import DiagnosisFinding, FindingLevel
from dashboards.formatting import format_params, format_value, progress_bar, short_names, sparkline, table_width
from orchestrator.interfaces import UpdatesOf
from orchestrator.spec.objectives import Objective
from orchestrator.spec.sweep_spec import SweepSpec
from orchestrator.study.trial_records import TrialRecord, TrialState, pareto_front, rank_trials
from trainer.metrics import COMPARISON_METRIC, MARGIN

_STYLE = {
    TrialState.RUNNING: "cyan",
    TrialState.PAUSED: "blue",
    TrialState.COMPLETE: "green",
    TrialState.PRUNED: "yellow",
    TrialState.FAILED: "red",
}
_REASON_WIDTH = 30
"""Characters. Smallest readable width of the reason column."""


def state_text(curves: TrialCurves) -> Text:
    """Return the colored state; DIVERGED for a trial that the divergence guard stopped."""
    record = curves.record
    word = "DIVERGED" if record.diverged else str(record.state)
    return Text(word, style="magenta" if record.diverged else _STYLE[record.state])


def trial_table(
    all_curves: Sequence[TrialCurves],
    paths: Sequence[str],
    objective: Objective,
    *,
    updates_of: UpdatesOf | None,
    width: int,
    most_reasons: int | None = None,
) -> RenderableType:
    """Return a table with one row per trial.

    Sparklines shrink with the width; on narrow terminals the reasons follow below the table.

    Args:
        all_curves: trials to show.
        paths: searched settings.
        objective: objective to show and to mark the best trial by.
        updates_of: total updates of a trial by its params; None where unknown.
        width: terminal width in characters.
        most_reasons: number of reasons below the table, the newest; None for all, wrapped.
    """
    reason = max((len(_remark(curves, False)) for curves in all_curves), default=0)
    wide = _table(all_curves, paths, objective, updates_of, is_wide=True, sparkline_width=12)
    if table_width(wide).maximum - max(0, reason - _REASON_WIDTH) <= width:
        return wide
    candidates = (
        _table(
            all_curves,
            paths,
            objective,
            updates_of,
            is_wide=False,
            sparkline_width=sparkline_width,
            is_narrow=sparkline_width < 6,
        )
        for sparkline_width in (10, 6, 3, 0)
    )
    table = next((made for made in candidates if table_width(made).maximum <= width), None)
    if table is None:
        table = _folded_table(all_curves, paths, objective, updates_of, progress=True)
        if table_width(table).minimum > width:
            table = _folded_table(all_curves, paths, objective, updates_of, progress=False)
    reasons = [v.record for v in all_curves if v.record.reason]
    if most_reasons is not None:
        reasons = reasons[max(0, len(reasons) - most_reasons) :] if most_reasons > 0 else []
    fixed_height = most_reasons is not None  # a live table has a fixed number of rows: reasons must not wrap
    lines = (Text(f"{r.number}: {r.reason}", no_wrap=fixed_height, overflow="ellipsis") for r in reasons)
    return Group(table, *lines)


def _table(
    all_curves: Sequence[TrialCurves],
    paths: Sequence[str],
    objective: Objective,
    updates_of: UpdatesOf | None,
    *,
    is_wide: bool,
    sparkline_width: int,
    is_narrow: bool = False,
) -> Table:
    """Return the table. `is_narrow`: wrapped column names and no padding; values are never cut."""
    short = short_names(paths)
    best = next(iter(rank_trials([v.record for v in all_curves], objective)), None)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, expand=False, padding=(0, 0) if is_narrow else (0, 1))
    table.add_column("trial", justify="right", no_wrap=True)
    table.add_column("state", no_wrap=True)
    for path in paths:
        table.add_column(_break_name(short[path]) if is_narrow else short[path], justify="right", no_wrap=True)
    table.add_column("step" if not is_wide else "progress", no_wrap=True)
    metric = objective.metric if is_wide else objective.metric.removeprefix("eval_")
    table.add_column(_break_name(metric) if is_narrow else metric, justify="right", no_wrap=True)
    if sparkline_width:
        table.add_column("margin" if is_wide else "marg.", no_wrap=True)
        table.add_column("accuracy" if is_wide else "acc.", no_wrap=True)
    if is_wide:
        table.add_column("", overflow="fold")
    for curves in all_curves:
        first = best is not None and best is curves.record
        row = [Text(f"★ {curves.record.number}" if first else str(curves.record.number)), state_text(curves)]
        row += [Text(format_value(curves.record.params.get(path))) for path in paths]
        total = None if updates_of is None else updates_of(curves.record.params)
        row += [_progress(curves, total, is_wide), _objective_cell(curves, objective, first)]
        if sparkline_width:
            row += [Text(sparkline(curves.values(MARGIN), sparkline_width), style="blue")]
            row += [Text(sparkline(curves.values(COMPARISON_METRIC), sparkline_width), style="green")]
        if is_wide:
            row += [Text(_remark(curves, first))]
        table.add_row(*row)
    return table


def _break_name(name: str) -> str:
    """Allow line breaks in a name after `_`, `/` and `.`."""
    return name.replace("_", "_\n").replace("/", "/\n").replace(".", ".\n")


def _folded_table(
    all_curves: Sequence[TrialCurves],
    paths: Sequence[str],
    objective: Objective,
    updates_of: UpdatesOf | None,
    *,
    progress: bool,
) -> Table:
    """Return a table with all settings in one wrapped column, for settings that need more than the width."""
    best = next(iter(rank_trials([v.record for v in all_curves], objective)), None)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, expand=False, padding=(0, 0))
    metric = _break_name(objective.metric.removeprefix("eval_"))
    for name in ("trial", "state", "configuration", *(["step"] if progress else []), metric):
        table.add_column(name, no_wrap=name != "configuration", overflow="fold")
    for curves in all_curves:
        first = best is not None and best is curves.record
        total = None if updates_of is None else updates_of(curves.record.params)
        table.add_row(
            Text(f"★ {curves.record.number}" if first else str(curves.record.number)),
            state_text(curves),
            Text(format_params(curves.record.params, paths)),
            *([_progress(curves, total, is_wide=False)] if progress else []),
            _objective_cell(curves, objective, first),
        )
    return table


def _progress(curves: TrialCurves, planned_updates: int | None, is_wide: bool) -> Text:
    if planned_updates is None:
        return Text(str(curves.last_update))
    if not is_wide:
        return Text(f"{curves.last_update}/{planned_updates}")
    return Text(
        f"{progress_bar(curves.last_update / planned_updates, 8)} {curves.last_update}/{planned_updates}",
        style="dim" if curves.record.state.is_final else "",
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
    spec: SweepSpec, all_curves: Sequence[TrialCurves], console: Console, *, updates_of: UpdatesOf | None
) -> None:
    """Print the table of trials and the best configuration, or the Pareto front."""
    ordered = sorted(all_curves, key=lambda v: v.record.number)
    console.print(
        trial_table(ordered, spec.search.paths, spec.first_objective, updates_of=updates_of, width=console.size.width)
    )
    ranked = rank_trials([v.record for v in ordered], *spec.objectives)
    if not ranked:
        over = bool(ordered) and all(v.record.state.is_final for v in ordered)
        console.print(
            Text("No trial completed; the reasons are in the table.", style="red")
            if over
            else Text("No trial has completed yet.", style="yellow")
        )
        return
    if len(spec.objectives) > 1:
        _print_front(spec, pareto_front(ranked, spec.objectives), console)
        return
    best, metric = ranked[0], spec.first_objective.metric
    console.print(
        Text("Best: ", style="bold").append(f"trial {best.number}", style="bold green")
        + Text(f"  {format_params(best.params, spec.search.paths)}  {metric}={format_value(best.value)}")
    )
    start = next((v.values(metric)[0] for v in ordered if v.values(metric)), None)
    if start is not None and best.value is not None:
        console.print(Text(f"The initial model has {metric}={format_value(start)}.", style="dim"))


def _print_front(spec: SweepSpec, best: Sequence[TrialRecord], console: Console) -> None:
    """Print the Pareto front of a multi-objective sweep."""
    console.print(Text(f"Pareto front of {len(spec.objectives)} objectives:", style="bold"))
    for record in best:
        objective_values = zip(spec.objectives, record.values or (), strict=True)
        values = "  ".join(f"{objective.metric}={format_value(value)}" for objective, value in objective_values)
        console.print(
            Text(f"  trial {record.number}", style="bold green")
            + Text(f"  {format_params(record.params, spec.search.paths)}  {values}")
        )


_FINDING_STYLE = {FindingLevel.SERIOUS: "bold red", FindingLevel.WARNING: "yellow", FindingLevel.NOTE: "cyan"}
_MAX_FINDINGS = 4


def print_findings(
    findings: Sequence[DiagnosisFinding], name: str, console: Console, *, most: int = _MAX_FINDINGS
) -> None:
    """Print at most `most` findings with their next steps, and the command for a follow-up sweep."""
    for finding in findings[:most]:
        head = Text(f"{finding.level}: ", style=_FINDING_STYLE[finding.level]).append(
            finding.title, style="bold not dim"
        )
        if console.is_terminal:
            console.print(head)
            console.print(Padding(Text(finding.next_step, style="dim"), (0, 0, 0, 2), expand=False))
        else:  # piped output is not wrapped
            console.print(head, soft_wrap=True)
            console.print(Text(f"  {finding.next_step}"), soft_wrap=True)
    if len(findings) > most:
        console.print(Text(f"and {len(findings) - most} more in the report", style="dim"))
    if findings:
        console.print(Text(f"To write a follow-up sweep from these findings: orchestrate suggest {name}"))
