"""The end of a sweep on the terminal: its table, its winner or its front."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from dashboards.frame import TrialView, show, show_params
from dashboards.tables import trial_table
from orchestrator.engine.view import StepsOf
from orchestrator.spec.sweep import SweepSpec
from orchestrator.study.ranking import front, ranking
from orchestrator.study.records import TrialRecord


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
