"""Table of trials for any terminal width, final summary of a sweep, and its most serious findings."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from dashboards.analysis.distance import KL_COLUMN, distance_column
from dashboards.analysis.seed_means import compared_paths, merge_curves
from dashboards.analysis.sweep_frame import TrialCurves
from dashboards.diagnosis.findings import DiagnosisFinding, FindingLevel
from dashboards.formatting import (
    format_half_widths,
    format_measured,
    format_params,
    format_settings,
    format_value,
    progress_bar,
    short_names,
    sparkline,
    table_width,
    tie_text,
)
from orchestrator.interfaces import UpdatesOf
from orchestrator.spec.objectives import Objective
from orchestrator.spec.sweep_spec import SweepSpec
from orchestrator.study.repeats import (
    confirmed_first,
    first_number,
    front_of_configurations,
    merge_records,
    rank_configurations,
)
from orchestrator.study.trial_records import TrialRecord, TrialState, pareto_front, rank_trials, requirements_text
from trainer.metrics import COMPARISON_METRIC, KL, MARGIN

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
    """Return the colored state; DIVERGED for a trial that the divergence guard stopped, its word for an idle one."""
    record = curves.record
    if curves.idle_word:
        return Text(curves.idle_word, style="blue")
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
    further: Sequence[Objective] = (),
    seeds: int = 1,
) -> RenderableType:
    """Return a table with one row per trial.

    Sparklines shrink with the width, and the distance from the initial model is shown where the width allows it; on
    narrow terminals the reasons follow below the table.

    Args:
        all_curves: trials to show.
        paths: searched settings.
        objective: objective to show and to mark the best trial by.
        further: further objectives to show; with any, the trials of the Pareto front are marked.
        updates_of: total updates of a trial by its params; None where unknown.
        width: terminal width in characters.
        most_reasons: number of reasons below the table, the newest; None for all, wrapped.
        seeds: trials of each configuration; one with fewer is not the best while another has all.
    """
    reason = max((len(_remark(curves, False)) for curves in all_curves), default=0)
    objectives = (objective, *further)
    marked = _marked(all_curves, objectives, seeds)
    distances = distance_column(all_curves)
    if distances[0] == KL_COLUMN and KL in {each.metric for each in objectives}:
        distances = ("", [])  # it has a column already
    for shown in (distances, None) if distances[0] else (None,):
        wide = _table(all_curves, paths, objectives, updates_of, marked, shown, is_wide=True, sparkline_width=12)
        if table_width(wide).maximum - max(0, reason - _REASON_WIDTH) <= width:
            return wide
    candidates = (
        _table(
            all_curves,
            paths,
            objectives,
            updates_of,
            marked,
            distances if with_distance else None,
            is_wide=False,
            sparkline_width=sparkline_width,
            is_narrow=sparkline_width < 6,
        )
        for sparkline_width, with_distance in ((10, True), (6, True), (10, False), (6, False), (3, False), (0, False))
        if distances[0] or not with_distance
    )
    table = next((made for made in candidates if table_width(made).maximum <= width), None)
    if table is None:
        table = _folded_table(all_curves, paths, objectives, updates_of, marked, progress=True)
        if table_width(table).minimum > width:
            table = _folded_table(all_curves, paths, objectives, updates_of, marked, progress=False)
    reasons = [curves.record for curves in all_curves if curves.record.reason]
    if most_reasons is not None:
        reasons = reasons[max(0, len(reasons) - most_reasons) :] if most_reasons > 0 else []
    fixed_height = most_reasons is not None  # a live table has a fixed number of rows: reasons must not wrap
    lines = (Text(f"trial {r.number}: {r.reason}", no_wrap=fixed_height, overflow="ellipsis") for r in reasons)
    return Group(table, *lines)


def _table(
    all_curves: Sequence[TrialCurves],
    paths: Sequence[str],
    objectives: Sequence[Objective],
    updates_of: UpdatesOf | None,
    marked: set[int],
    distances: tuple[str, Sequence[float | None]] | None = None,
    *,
    is_wide: bool,
    sparkline_width: int,
    is_narrow: bool = False,
) -> Table:
    """Return the table.

    Args:
        all_curves, paths, objectives, updates_of, marked: As in `trial_table`.
        distances: Name and values of the column of distances from the initial model; None for no such column.
        is_wide: Whole names, bars of progress, and remarks.
        sparkline_width: Characters of each sparkline; 0 for none.
        is_narrow: Wrapped column names and no padding; values are never cut.
    """
    short = short_names(paths)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, expand=False, padding=(0, 0) if is_narrow else (0, 1))
    table.add_column("trial", justify="right", no_wrap=True)
    table.add_column("state", no_wrap=True)
    for path in paths:
        table.add_column(_break_name(short[path]) if is_narrow else short[path], justify="right", no_wrap=True)
    table.add_column("step" if not is_wide else "progress", no_wrap=True)
    for objective in objectives:
        metric = objective.metric if is_wide else objective.metric.removeprefix("eval_")
        table.add_column(_break_name(metric) if is_narrow else metric, justify="right", no_wrap=True)
    if distances is not None:
        table.add_column(distances[0], justify="right", no_wrap=True)
    if sparkline_width:
        table.add_column("margin" if is_wide else "marg.", no_wrap=True)
        table.add_column("accuracy" if is_wide else "acc.", no_wrap=True)
    if is_wide:
        table.add_column("", overflow="fold")
    settings = _rows(format_settings([curves.record.params.get(path) for curves in all_curves]) for path in paths)
    values = _rows(_objective_column(all_curves, objectives, k) for k in range(len(objectives)))
    far = [] if distances is None else format_measured(distances[1], 3)
    for k, curves in enumerate(all_curves):
        first = curves.record.number in marked
        row = [Text(f"★ {curves.record.label}" if first else curves.record.label), state_text(curves)]
        row += [Text(cell) for cell in settings[k]] if paths else []
        total = None if updates_of is None else updates_of(curves.record.params)
        row += [
            _progress(curves, total, is_wide),
            *(Text(value, style="bold green" if first else "") for value in values[k]),
        ]
        if distances is not None:
            row += [Text(far[k] if distances[1][k] is not None else "")]
        if sparkline_width:
            row += [Text(sparkline(curves.values(MARGIN), sparkline_width), style="blue")]
            row += [Text(sparkline(curves.values(COMPARISON_METRIC), sparkline_width), style="green")]
        if is_wide:
            row += [Text(_remark(curves, first, is_front=len(objectives) > 1))]
        table.add_row(*row)
    return table


def _break_name(name: str) -> str:
    """Allow line breaks in a name after `_`, `/` and `.`."""
    return name.replace("_", "_\n").replace("/", "/\n").replace(".", ".\n")


def _folded_table(
    all_curves: Sequence[TrialCurves],
    paths: Sequence[str],
    objectives: Sequence[Objective],
    updates_of: UpdatesOf | None,
    marked: set[int],
    *,
    progress: bool,
) -> Table:
    """Return a table with all settings in one wrapped column, for settings that need more than the width."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, expand=False, padding=(0, 0))
    metrics = [_break_name(objective.metric.removeprefix("eval_")) for objective in objectives]
    for name in ("trial", "state", "configuration", *(["step"] if progress else []), *metrics):
        table.add_column(name, no_wrap=name != "configuration", overflow="fold")
    values = _rows(_objective_column(all_curves, objectives, k) for k in range(len(objectives)))
    for k, curves in enumerate(all_curves):
        first = curves.record.number in marked
        total = None if updates_of is None else updates_of(curves.record.params)
        table.add_row(
            Text(f"★ {curves.record.label}" if first else curves.record.label),
            state_text(curves),
            Text(format_params(curves.record.params, paths)),
            *([_progress(curves, total, is_wide=False)] if progress else []),
            *(Text(value, style="bold green" if first else "") for value in values[k]),
        )
    return table


def _rows(columns: Iterable[Sequence[str]]) -> list[tuple[str, ...]]:
    return list(zip(*columns, strict=True))


def _marked(all_curves: Sequence[TrialCurves], objectives: Sequence[Objective], seeds: int) -> set[int]:
    """Return the number of the best trial; with several objectives those of the Pareto front."""
    records = [curves.record for curves in all_curves]
    if len(objectives) > 1:
        finalists = [r for r in confirmed_first(records) if r.finalist_of is not None and r.keeps_requirements]
        if front := pareto_front(finalists, objectives):
            return {record.number for record in front}
        records = [record for record in records if record.finalist_of is None]
        missing = {record.number: max(0, seeds - record.complete_seeds) for record in records}
        for least in sorted(set(missing.values())):  # those with the most of their seeds, as in the sweep's own front
            if front := pareto_front([r for r in records if missing[r.number] == least], objectives):
                return {record.number for record in front}
        return set()
    best = best_record(records, objectives[0], seeds)
    return set() if best is None else {best.number}


def best_record(records: Sequence[TrialRecord], objective: Objective, seeds: int) -> TrialRecord | None:
    """Return the best of these records that keep the requirements; one with all `seeds` before one with fewer.

    A confirmed finalist comes before the trials of the search.
    """
    ranked = [record for record in confirmed_first(rank_trials(records, objective)) if record.keeps_requirements]
    if ranked and ranked[0].finalist_of is not None:
        return ranked[0]
    return min(ranked, key=lambda record: max(0, seeds - record.complete_seeds), default=None)


def _progress(curves: TrialCurves, planned_updates: int | None, is_wide: bool) -> Text:
    if planned_updates is None:
        return Text(str(curves.last_update))
    if not is_wide:
        return Text(f"{curves.last_update}/{planned_updates}")
    return Text(
        f"{progress_bar(curves.last_update / planned_updates, 8)} {curves.last_update}/{planned_updates}",
        style="dim" if curves.record.state.is_final else "",
    )


def _objective_column(all_curves: Sequence[TrialCurves], objectives: Sequence[Objective], k: int) -> list[str]:
    """Return the cells of objective `k`: final values, of unfinished trials the newest; for the first the interval."""
    values = [
        curves.record.values[k]
        if curves.record.values
        else curves.record.value
        if k == 0 and curves.record.value is not None
        else curves.last(objectives[k].metric)
        for curves in all_curves
    ]
    texts = ["" if value is None else text for value, text in zip(values, format_measured(values), strict=True)]
    if k > 0:
        return texts
    widths = format_half_widths([curves.record.interval for curves in all_curves])
    return [text + width for text, width in zip(texts, widths, strict=True)]


def _remark(curves: TrialCurves, best: bool, *, is_front: bool = False) -> str:
    remark = _remark_on_result(curves, best, is_front=is_front)
    if curves.record.finalist_of is None:
        return remark
    finalist = f"finalist, as trial {curves.record.finalist_of}"
    return f"{finalist}; {remark}" if remark else finalist


def _remark_on_result(curves: TrialCurves, best: bool, *, is_front: bool) -> str:
    if best:
        word = "Pareto front" if is_front else "best"
        return f"{word}, {curves.record.seeds_text}" if curves.record.seeds else word
    if curves.record.breaks and not curves.record.reason:
        return f"breaks: {'; '.join(curves.record.breaks)}"
    if curves.record.seeds and not curves.record.reason:
        return curves.record.seeds_text
    if curves.record.reason:
        return curves.record.reason
    return f"attempt {curves.record.attempts}" if curves.record.attempts > 1 else ""


def print_final_summary(
    spec: SweepSpec, all_curves: Sequence[TrialCurves], console: Console, *, updates_of: UpdatesOf | None
) -> None:
    """Print the table of trials and the best configuration, or the Pareto front."""
    ordered = sorted(all_curves, key=lambda curves: curves.record.number)
    for curves in ordered:
        if curves.record.state is TrialState.RUNNING:
            curves.idle_word = "INTERRUPTED"  # the driver has ended
    paths, rows = compared_paths(spec), merge_curves(ordered, spec)
    seeds = spec.seeds_per_configuration
    console.print(
        trial_table(
            rows,
            paths,
            spec.first_objective,
            updates_of=updates_of,
            width=console.size.width,
            further=spec.also,
            seeds=seeds,
        )
    )
    ranked = rank_configurations([curves.record for curves in ordered], spec)
    if not ranked:
        over = bool(ordered) and all(curves.record.state.is_final for curves in ordered)
        console.print(
            Text("No trial completed; the reasons are in the table.", style="red")
            if over
            else Text("No trial has completed yet.", style="yellow")
        )
        return
    if text := requirements_text(ranked):
        console.print(Text(f"{text}.", style="yellow"))
    if not ranked[0].keeps_requirements:
        _print_initial(spec, ordered, console)
        return
    if len(spec.objectives) > 1:
        front = front_of_configurations([curves.record for curves in ordered], spec)
        _print_front(spec, front, console)
        _print_initial(spec, _on_rows_of(front[0], ordered) if front else ordered, console)
        return
    best, metric = ranked[0], spec.first_objective.metric
    console.print(
        Text("Best: ", style="bold").append(
            f"{'trials' if len(best.seeds) > 1 else 'trial'} {best.label}", style="bold green"
        )
        + Text("".join(f"  {text}" for text in (format_params(best.params, paths),) if text))
        + Text(f"  {metric}={format_value(best.value)}")
        + Text(f" ({best.seeds_text})" if best.seeds else "")
    )
    if best.finalist_of is not None:
        search = next((r for r in _merged_search(ordered, spec) if first_number(r) == best.finalist_of), None)
        if search is not None:
            before = f"in the search it had {format_value(search.value)}"
            console.print(Text(f"Confirmed on held-out rows that the search has not seen; {before}."))
    elif tied := [str(record.number) for record in ranked[1:] if record.value == best.value and not record.breaks]:
        console.print(Text(tie_text(str(best.number), tied)))
    _print_initial(spec, _on_rows_of(best, ordered), console)


def _on_rows_of(best: TrialRecord, all_curves: Sequence[TrialCurves]) -> list[TrialCurves]:
    """Return the trials that were evaluated on the same held-out rows: those of the finalists, or of the search."""
    return [c for c in all_curves if (c.record.finalist_of is None) == (best.finalist_of is None)]


def _merged_search(all_curves: Sequence[TrialCurves], spec: SweepSpec) -> list[TrialRecord]:
    return merge_records([c.record for c in all_curves if c.record.finalist_of is None], spec)


def _print_initial(spec: SweepSpec, ordered: Sequence[TrialCurves], console: Console) -> None:
    """Print the initial model's value of every objective that was measured, on the rows of the trials given."""
    found = [
        f"{objective.metric}={format_value(start)}"
        for objective in spec.objectives
        if (
            start := next(
                (curves.values(objective.metric)[0] for curves in ordered if curves.values(objective.metric)), None
            )
        )
        is not None
    ]
    if found:
        console.print(Text(f"The initial model has {', '.join(found)}.", style="dim"))


def _print_front(spec: SweepSpec, best: Sequence[TrialRecord], console: Console) -> None:
    """Print the Pareto front of a multi-objective sweep."""
    console.print(Text(f"Pareto front of {len(spec.objectives)} objectives:", style="bold"))
    for record in best:
        objective_values = zip(spec.objectives, record.values or (), strict=True)
        values = "  ".join(f"{objective.metric}={format_value(value)}" for objective, value in objective_values)
        console.print(
            Text(f"  {'trials' if len(record.seeds) > 1 else 'trial'} {record.label}", style="bold green")
            + Text(f"  {format_params(record.params, compared_paths(spec))}  {values}")
        )


_FINDING_STYLE = {FindingLevel.SERIOUS: "bold red", FindingLevel.WARNING: "yellow", FindingLevel.NOTE: "cyan"}
_MAX_FINDINGS = 4


def print_findings(
    findings: Sequence[DiagnosisFinding],
    name: str,
    console: Console,
    *,
    most: int = _MAX_FINDINGS,
    follow_up: bool = True,
) -> None:
    """Print at most `most` findings with their next steps, and the command for a follow-up sweep, if one follows."""
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
    if findings and follow_up:
        console.print(Text(f"To write a follow-up sweep from these findings: orchestrate suggest {name}"))
