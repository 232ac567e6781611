"""Output of the commands as tables on stdout; `--json` prints the same data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from datetime import datetime
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from orchestrator.spec.estimates.disk_space import format_bytes

if TYPE_CHECKING:
    from orchestrator.commands.doctor import Check
    from orchestrator.spec.estimates.sweep_plan import SweepPlan

_REASON_WIDTH = 30
"""Columns in which a reason can still be read."""
_PIPED_WIDTH = 200
"""Columns of a table that goes into a file or another program."""


def print_plan(plan: SweepPlan) -> None:
    """The plan as two columns, then what is written, then what to know."""
    console = _console()
    table = _key_figures(f"plan of {plan.name}")
    table.add_row("goal", plan.goal)
    for path, values in plan.searched.items():
        table.add_row(path, escape(values))
    unknown = "unknown until downloaded"
    grid = f" (the grid has {plan.grid:,} distinct points)" if plan.grid is not None else ""
    table.add_row("trials", f"{plan.trials:,}{grid}" if plan.trials else "until the budget's hours are spent")
    for limit, value in plan.budget.items():
        table.add_row(f"budget.{limit}", f"{value:g}")
    table.add_row("at a time", str(plan.concurrency or "none on this machine"))
    table.add_row("training pairs", f"{plan.train_pairs:,}" if plan.train_pairs is not None else unknown)
    table.add_row("held-out pairs", f"{plan.eval_pairs:,}" if plan.eval_pairs is not None else unknown)
    table.add_row("updates per trial", str(plan.updates_per_trial or unknown))
    table.add_row("pairs per trial", str(plan.pairs_per_trial or unknown))
    tokens = plan.tokens_per_trial_at_most
    table.add_row("tokens per trial, at most", f"{tokens:,}" if tokens is not None else unknown)
    if plan.tokens_at_most is not None:
        table.add_row("tokens of the sweep, at most", f"{plan.tokens_at_most:,}")
    table.add_row(
        "disk, at its fullest", unknown if plan.disk_bytes is None else f"about {format_bytes(plan.disk_bytes)}"
    )
    table.add_row("identity", plan.identity[:12])
    console.print(table)
    _print_estimate(console, plan)
    _print_probe(console, plan)
    corners = Table(title="corners, each checked", box=None, title_justify="left", header_style="bold")
    paths = list(plan.searched)
    for path in paths:
        corners.add_column(path)
    for point in plan.corners[:32]:
        corners.add_row(*(_short(point[path]) if path in point else "-" for path in paths))
    if paths:
        console.print(corners)
    if len(plan.corners) > 32:
        console.print(f"and {len(plan.corners) - 32} more corners (--json has them all)")
    writes = _key_figures("will be written")
    for written in plan.writes:
        writes.add_row(escape(written.path), written.what)
    console.print(writes)
    for notice in plan.notices:
        console.print(f"note: {notice}", markup=False)


def _print_estimate(console: Console, plan: SweepPlan) -> None:
    """Memory, time and cost, which are formulas and not measurements."""
    made = plan.estimate
    if made is None:
        console.print("no estimate: the model is not on this machine yet, or there is no formula for its architecture")
        return
    table = _key_figures("by formula, nothing measured")
    table.add_row("parameters", f"{made.parameters:,}")
    parts = {f.name: getattr(made.memory, f.name) / 1e9 for f in fields(made.memory)}
    listed = ", ".join(f"{name} {size:.3g}" for name, size in parts.items() if size)
    table.add_row("memory per GPU", f"{made.memory.total / 1e9:,.3g} GB: {listed}")
    if made.gpu_memory is not None:
        fits = f"{made.tokens_per_micro_batch:,} tokens" if made.tokens_per_micro_batch else "not even one pair"
        table.add_row("micro-batch that fits", f"{fits}, on {made.place}")
    if made.trials_on_a_gpu is not None:
        copies, over_one = made.trials_on_a_gpu
        row = f"{copies} with a copy of the model each, {over_one} over one frozen model (trials_per_process)"
        table.add_row("trials that fit a GPU", row)
    if made.gpu_hours_per_trial is not None:
        table.add_row("GPU-hours per trial", f"{made.gpu_hours_per_trial:,.3g}")
    if made.gpu_hours is not None:
        table.add_row("GPU-hours of the sweep", f"{made.gpu_hours:,.3g} if no trial is stopped early")
    if made.cost is not None:
        table.add_row("cost of the sweep", f"{made.cost:,.2f}")
    table.add_row("assumed", made.assumed)
    console.print(table)


def _print_probe(console: Console, plan: SweepPlan) -> None:
    """The measured update, each figure beside its formula's."""
    made = plan.probe
    if made is None:
        return
    found = made.measured
    several = f", {found.processes} processes" if found.processes > 1 else ""
    table = _key_figures(f"measured here, on {found.device}{several}")
    seconds = "" if made.formula_seconds is None else f"; by formula {made.formula_seconds:.3g} s"
    table.add_row("an update", f"{found.seconds:.3g} s for {found.pairs:,} pairs, {found.tokens:,} tokens{seconds}")
    by_formula = "" if made.formula_bytes is None else f"; by formula {made.formula_bytes / 1e9:.3g} GB"
    by_formula += "" if made.gpu else " on a GPU"
    what = f"{found.peak_bytes / 1e9:.3g} GB with {found.tokens_per_micro_batch:,} tokens per micro-batch{by_formula}"
    table.add_row("memory per GPU" if made.gpu else "memory beyond the program's", what)
    if (right := made.corrected) is not None:
        if made.gpu and right.gpu_memory is not None:
            fits = f"{right.tokens_per_micro_batch:,} tokens" if right.tokens_per_micro_batch else "not even one pair"
            table.add_row("micro-batch that fits", f"{fits}, on {right.place}")
        hours = "GPU-hours" if made.gpu else "hours"
        if right.gpu_hours_per_trial is not None:
            table.add_row(f"{hours} per trial", f"{right.gpu_hours_per_trial:,.3g}")
        if right.gpu_hours is not None:
            table.add_row(f"{hours} of the sweep", f"{right.gpu_hours:,.3g} if no trial is stopped early")
        if right.cost is not None:
            table.add_row("cost of the sweep", f"{right.cost:,.2f}")
        table.add_row("assumed", right.assumed)
    console.print(table)


def print_status(found: Mapping[str, Any]) -> None:
    """One line for the sweep, one row a trial."""
    console = _console()
    objective = found.get("goal")
    console.print(f"{found['name']}: {found['state']}, {_goal(objective)}", markup=False)
    for text in (found.get("why"), *found.get("waiting", ()), _mirror(found.get("mirror"))):
        if text:
            console.print(text, markup=False)
    trials: Sequence[Mapping[str, Any]] = found.get("trials", ())
    metric = objective.get("metric") if isinstance(objective, Mapping) else None
    paths = list(dict.fromkeys(path for trial in trials for path in trial.get("params", {})))
    table = Table(box=None, header_style="bold")
    for column in ("trial", "state", "step", *paths, *([str(metric)] if metric else []), "reason"):
        table.add_column(column, overflow="fold")
    for trial in trials:
        params, metrics = trial.get("params", {}), trial.get("metrics", {})
        table.add_row(
            _trial_cell(trial, found),
            str(trial["state"]),
            f"{trial.get('step', 0)}/{trial.get('steps') or '?'}",
            *(_short(params[path]) if path in params else "-" for path in paths),
            *([_short(metrics.get(metric))] if metric else []),
            escape("; ".join(text for text in (trial.get("reason"), trial.get("origin")) if text)),
        )
    if not console.is_terminal or _needed_width(table, trials) <= console.width:
        console.print(table)
        return
    for trial in trials:  # in a narrow terminal a row a trial would cut values
        value = f"  {metric}={_short(trial.get('metrics', {}).get(metric))}" if metric else ""
        progress = f"{trial.get('step', 0)}/{trial.get('steps') or '?'}"
        head = f"trial {_trial_cell(trial, found)} {trial['state']} {progress}{value}"
        console.print(head, markup=False, style="bold")
        text = "; ".join(text for text in (trial.get("reason"), trial.get("origin")) if text)
        for line in (_params(trial.get("params", {})), text):
            if line:
                console.print(Padding(Text(line), (0, 0, 0, 2), expand=False))


def _mirror(found: Mapping[str, Any] | None) -> str:
    """Nothing while all copies arrive."""
    if not found or not found["told"]:
        return ""
    return f"mirror {found['url']}: told of {found['told']} times, last: {found['last']} (all: orchestrate history)"


def _trial_cell(trial: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """Its number; the best one's, or the front's, with a star."""
    number = trial["number"]
    return f"★ {number}" if number in found.get("front", ()) else str(number)


def _needed_width(table: Table, trials: Sequence[Mapping[str, Any]]) -> int:
    """Columns that the table needs; reasons may be broken over lines."""
    unbounded = Console(width=1000, height=100)  # both: on a dumb terminal rich goes by 80 columns else
    reason = max((len(trial.get("reason") or "") for trial in trials), default=0)
    return Measurement.get(unbounded, unbounded.options, table).maximum - max(0, reason - _REASON_WIDTH)


def print_history(found: Mapping[str, Any]) -> None:
    """One row an event."""
    table = Table(box=None, header_style="bold")
    for column in ("when", "trial", "what", "why"):
        table.add_column(column, overflow="fold")
    for event in found["events"]:
        when = datetime.fromtimestamp(event["at"]).astimezone().strftime("%F %T")
        trial = "" if event["trial"] is None else str(event["trial"])
        table.add_row(when, trial, event["kind"], escape(event["text"]))
    _console().print(table)


def print_best(found: Mapping[str, Any]) -> None:
    """The winner's settings and metrics."""
    table = _key_figures("best")
    for key, value in found.items():
        if key == "front":
            for member in value:
                texts = ", ".join(map(_short, member["values"])) + "  " + _params(member["params"])
                table.add_row(escape(f"front trial {member['number']}"), escape(texts))
        elif isinstance(value, Mapping):
            for inner, path in sorted(value.items()):
                table.add_row(escape(f"{key} {inner}"), escape(_short(path)))
        elif value not in (None, ""):
            table.add_row(key, escape(_short(value)))
    _console().print(table)


def print_checks(checks: Sequence[Check]) -> None:
    """One row a check; what is wrong has its fix below."""
    table = Table(box=None, header_style="bold")
    for column in ("", "what", "found", "fix"):
        table.add_column(column)
    colors = {"ok": "green", "warn": "yellow", "fail": "red"}
    for check in checks:
        level = check.level.value
        table.add_row(f"[{colors[level]}]{level}[/]", check.what, escape(check.found), escape(check.fix))
    _console().print(table)


def _params(params: Mapping[str, Any]) -> str:
    return " ".join(f"{path}={_short(value)}" for path, value in params.items())


def _goal(objective: Any) -> str:
    return f"{objective['direction']} {objective['metric']}" if isinstance(objective, Mapping) else str(objective)


def _console() -> Console:
    # Piped output is for reading later: no line is broken to fit a terminal that is not there.
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=_PIPED_WIDTH)


def _key_figures(title: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, show_header=False)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    return table


def _short(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
