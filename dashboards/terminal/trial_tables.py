"""The tables of a sweep, for terminals of any width.

The end of a sweep on the terminal: its table, its winner or its front.

The diagnosis on a terminal: the weightiest findings, short.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console, Group, RenderableType
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from dashboards.analysis.sweep_frame import TrialView, short_names, show, show_params
from dashboards.diagnosis.findings import Finding, Level
from dashboards.formatting import bar, sparkline
from orchestrator.interfaces import StepsOf
from orchestrator.spec.sweep_spec import Goal, SweepSpec
from orchestrator.study.trial_records import TrialRecord, TrialState, front, ranking

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
_REASON = 30
"""Columns in which a reason can still be read."""


def state_text(view: TrialView) -> Text:
    """The state in its colour; a diverged trial is told from a hopeless one."""
    record = view.record
    word = "DIVERGED" if record.diverged else str(record.state)
    return Text(word, style="magenta" if record.diverged else _STYLE[record.state])


def trial_table(
    views: Sequence[TrialView],
    paths: Sequence[str],
    goal: Goal,
    *,
    steps: StepsOf | None,
    width: int,
    most_reasons: int | None = None,
) -> RenderableType:
    """One row a trial; on narrow terminals the reasons stand below, the newest `most_reasons` of them.

    `steps`: updates by params. Sparklines are as wide as there is room for, down to none.
    """
    reason = max((len(_remark(view, False)) for view in views), default=0)
    roomy = _table(views, paths, goal, steps, roomy=True, spark=12)
    if _measured(roomy).maximum - max(0, reason - _REASON) <= width:
        return roomy
    tried = (_table(views, paths, goal, steps, roomy=False, spark=spark, tight=spark < 6) for spark in (10, 6, 3, 0))
    table = next((made for made in tried if _measured(made).maximum <= width), None)
    if table is None:
        table = _folded(views, paths, goal, steps, progress=True)
        if _measured(table).minimum > width:
            table = _folded(views, paths, goal, steps, progress=False)
    reasons = [v.record for v in views if v.record.reason]
    if most_reasons is not None:
        reasons = reasons[max(0, len(reasons) - most_reasons) :] if most_reasons > 0 else []
    live = most_reasons is not None  # there a line is a line: what wraps would not fit
    lines = (Text(f"{r.number}: {r.reason}", no_wrap=live, overflow="ellipsis") for r in reasons)
    return Group(table, *lines)


def _measured(table: Table) -> Measurement:
    console = Console(width=1000, height=100)  # both: on a dumb terminal rich goes by 80 columns else
    return Measurement.get(console, console.options, table)


def _table(
    views: Sequence[TrialView],
    paths: Sequence[str],
    goal: Goal,
    steps: StepsOf | None,
    *,
    roomy: bool,
    spark: int,
    tight: bool = False,
) -> Table:
    """`tight`: names are broken over lines and columns stand closer; a value is never cut."""
    short = short_names(paths)
    best = next(iter(ranking([v.record for v in views], goal)), None)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, expand=False, padding=(0, 0) if tight else (0, 1))
    table.add_column("trial", justify="right", no_wrap=True)
    table.add_column("state", no_wrap=True)
    for path in paths:
        table.add_column(_broken(short[path]) if tight else short[path], justify="right", no_wrap=True)
    table.add_column("step" if not roomy else "progress", no_wrap=True)
    metric = goal.metric if roomy else goal.metric.removeprefix("eval_")
    table.add_column(_broken(metric) if tight else metric, justify="right", no_wrap=True)
    if spark:
        table.add_column("margin" if roomy else "marg.", no_wrap=True)
        table.add_column("accuracy" if roomy else "acc.", no_wrap=True)
    if roomy:
        table.add_column("", overflow="fold")
    for view in views:
        first = best is not None and best is view.record
        row = [Text(f"★ {view.record.number}" if first else str(view.record.number)), state_text(view)]
        row += [Text(show(view.record.params.get(path))) for path in paths]
        of = None if steps is None else steps(view.record.params)
        row += [_progress(view, of, roomy), _goal_cell(view, goal, first)]
        if spark:
            row += [Text(sparkline(view.values(MARGINS), spark), style="blue")]
            row += [Text(sparkline(view.values(ACCURACIES), spark), style="green")]
        if roomy:
            row += [Text(_remark(view, first))]
        table.add_row(*row)
    return table


def _broken(name: str) -> str:
    """A name over several lines: learning_rate is two short words."""
    return name.replace("_", "_\n").replace("/", "/\n").replace(".", ".\n")


def _folded(
    views: Sequence[TrialView], paths: Sequence[str], goal: Goal, steps: StepsOf | None, *, progress: bool
) -> Table:
    """For more leaves than there is room for: all of them in one column, over as many lines as they need."""
    best = next(iter(ranking([v.record for v in views], goal)), None)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, expand=False, padding=(0, 0))
    metric = _broken(goal.metric.removeprefix("eval_"))
    for name in ("trial", "state", "configuration", *(["step"] if progress else []), metric):
        table.add_column(name, no_wrap=name != "configuration", overflow="fold")
    for view in views:
        first = best is not None and best is view.record
        of = None if steps is None else steps(view.record.params)
        table.add_row(
            Text(f"★ {view.record.number}" if first else str(view.record.number)),
            state_text(view),
            Text(show_params(view.record.params, paths)),
            *([_progress(view, of, roomy=False)] if progress else []),
            _goal_cell(view, goal, first),
        )
    return table


def _progress(view: TrialView, steps: int | None, roomy: bool) -> Text:
    if view.record.state is TrialState.QUEUED:
        return Text("")
    if steps is None:
        return Text(str(view.step))
    if not roomy:
        return Text(f"{view.step}/{steps}")
    return Text(f"{bar(view.step / steps, 8)} {view.step}/{steps}", style="dim" if view.record.state.finished else "")


def _goal_cell(view: TrialView, goal: Goal, best: bool) -> Text:
    value = view.record.value if view.record.value is not None else view.last(goal.metric)
    return Text("" if value is None else show(value), style="bold green" if best else "")


def _remark(view: TrialView, best: bool) -> str:
    if best:
        return "best"
    if view.record.reason:
        return view.record.reason
    return f"attempt {view.record.attempts}" if view.record.attempts > 1 else ""


def summary(spec: SweepSpec, views: Sequence[TrialView], console: Console, *, steps: StepsOf | None) -> None:
    """The table of trials, the best configuration, and what to type next."""
    ordered = sorted(views, key=lambda v: v.record.number)
    console.print(trial_table(ordered, spec.search.paths, spec.goal, steps=steps, width=console.size.width))
    ranked = ranking([v.record for v in ordered], *spec.goals)
    if not ranked:
        over = bool(ordered) and all(v.record.state.finished for v in ordered)
        console.print(
            Text("No trial completed; the reasons are in the table.", style="red")
            if over
            else Text("No trial has completed yet.", style="yellow")
        )
        return
    if len(spec.goals) > 1:
        _print_front(spec, front(ranked, spec.goals), console)
        return
    best = ranked[0]
    console.print(
        Text("Best: ", style="bold").append(f"trial {best.number}", style="bold green")
        + Text(f"  {show_params(best.params, spec.search.paths)}  {spec.goal.metric}={show(best.value)}")
    )
    start = next((v.values(spec.goal.metric)[0] for v in ordered if v.values(spec.goal.metric)), None)
    if start is not None and best.value is not None:
        console.print(Text(f"The start model had {spec.goal.metric}={show(start)}.", style="dim"))


def _print_front(spec: SweepSpec, best: Sequence[TrialRecord], console: Console) -> None:
    """Of several goals no trial is the best: those that no other one beats in all of them."""
    console.print(Text(f"The Pareto front of {len(spec.goals)} goals:", style="bold"))
    for record in best:
        told = zip(spec.goals, record.values or (), strict=True)
        values = "  ".join(f"{goal.metric}={show(value)}" for goal, value in told)
        console.print(
            Text(f"  trial {record.number}", style="bold green")
            + Text(f"  {show_params(record.params, spec.search.paths)}  {values}")
        )


_FINDING_STYLE = {Level.SERIOUS: "bold red", Level.WARNING: "yellow", Level.NOTE: "cyan"}
_MOST = 4


def tell_findings(findings: Sequence[Finding], name: str, console: Console, *, most: int = _MOST) -> None:
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
