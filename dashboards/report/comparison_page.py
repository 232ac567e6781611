"""The comparison as a page, in the panels of the report, and as a table for the terminal."""

from __future__ import annotations

import dataclasses

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Table as RichTable
from rich.text import Text

from dashboards.analysis.comparison import CHOSEN, EXACT, MARGIN, ComparedSweep, SweepComparison
from dashboards.analysis.run_costs import costs
from dashboards.analysis.sweep_frame import format_brief, format_signed
from dashboards.diagnosis.diagnose import diagnose
from dashboards.diagnosis.findings import FindingLevel
from dashboards.report.blocks import Block, Findings, KeyFigure, KeyFigures, Panel, Paragraph, Table
from dashboards.report.html_page import render_page
from dashboards.report.panels import PANELS
from dashboards.report.panels.trials_and_cost import format_count, format_hours
from trainer.metrics import COMPARISON_METRIC

HEAD = ("", "sweep", "objective", "trial", "configuration", COMPARISON_METRIC.removeprefix("eval_"), "behind by (95 %)")
_CONFIGURATION, _FOLDED = 4, 22
"""The column that may be broken over lines, and to how many characters."""
EXTRA_HEAD = ("gain", "margin", "chosen log-prob", "right answers", "trials", "tokens", "slot-hours")


def comparison_page(found: SweepComparison) -> str:
    """One HTML file, like the report."""
    frame = found.analysis.frame
    panels = [_ranking(found), *(panel for draw in PANELS if (panel := draw(found.analysis)) is not None)]
    shown = [_rename_panel(panel) for panel in panels if panel.key != "diagnosis"]
    title = " · ".join(frame.sweeps)
    text = f"{len(frame.sweeps)} sweeps by one ruler: {COMPARISON_METRIC}, which no objective and no beta scales."
    return render_page(shown, kind="comparison", title=title, description=text, state=frame.state, at=frame.at)


def _rename_panel(panel: Panel) -> Panel:
    return dataclasses.replace(panel, title="All their trials") if panel.key == "answer" else panel


def _ranking(found: SweepComparison) -> Panel:
    first = found.sweeps[0]
    blocks: list[Block] = []
    if first.trial is None:
        blocks.append(Paragraph("No trial of these sweeps completed.", strong=True))
    else:
        figures = [
            KeyFigure(
                f"first: {first.frame.name}, trial {first.trial.label}",
                first.frame.describe_params(first.trial) or first.objective,
            ),
            KeyFigure(COMPARISON_METRIC, format_brief(first.value)),
        ]
        blocks += [KeyFigures(tuple(figures)), Paragraph(comparison_summary(found), strong=True)]
    if found.warnings:
        blocks.append(Table(("what to know before believing it",), tuple((line,) for line in found.warnings)))
    first_row = frozenset({0})
    rows = tuple(table_row(c, rank_number) for rank_number, c in enumerate(found.sweeps, 1))
    blocks.append(Table(HEAD, rows, frozenset({0, 5, 6}), marked=first_row))
    note = tuple((c.frame.name, *extra_columns(c)) for c in found.sweeps)
    blocks.append(Table(("sweep", *EXTRA_HEAD), note, frozenset(range(1, 1 + len(EXTRA_HEAD))), marked=first_row))
    serious = tuple(
        dataclasses.replace(finding, title=f"{c.frame.name}: {finding.title[:1].lower()}{finding.title[1:]}")
        for c in found.sweeps
        for finding in diagnose(c.frame)
        if finding.level is FindingLevel.SERIOUS
    )
    if serious:
        blocks.append(Findings(serious))
    return Panel("ranking", "Who is first", "The best trial of each sweep.", blocks)


def comparison_summary(found: SweepComparison) -> str:
    """Who is first, and whether that is clear."""
    first, *others = found.sweeps
    if first.trial is None:
        return "No trial of these sweeps completed."
    indistinguishable = [c for c in others if c.behind is not None and not c.behind.is_clear]
    unknown = [c for c in others if c.trial is not None and c.behind is None]
    text = f"{first.frame.name} ({first.objective}) is first with {COMPARISON_METRIC} = {format_brief(first.value)}"
    if indistinguishable:
        text += "; it cannot be told apart from " + ", ".join(c.frame.name for c in indistinguishable)
    elif others and not unknown:
        text += ", clearly ahead of every other"
    if unknown:
        text += "; how sure that is against " + ", ".join(c.frame.name for c in unknown) + " cannot be told"
    return text + "."


def table_row(c: ComparedSweep, rank_number: int) -> tuple[str, ...]:
    """What always fits."""
    if c.trial is None:
        return ("–", c.frame.name, c.objective, "–", "no trial completed", "–", "–")
    behind = (
        "–"
        if c.behind is None
        else f"{format_brief(c.behind.mean)} ({format_signed(c.behind.low)} … {format_signed(c.behind.high)})"
    )
    return (
        str(rank_number),
        c.frame.name,
        c.objective,
        c.trial.label,
        c.frame.describe_params(c.trial),
        format_brief(c.value),
        behind,
    )


def extra_columns(c: ComparedSweep) -> tuple[str, ...]:
    """What is good to know beside it."""
    usage = costs(c.frame.trials)
    trials = f"{len(c.frame.ranked)}/{len(c.frame.trials)}"
    if c.trial is None:
        return ("–", "–", "–", "–", trials, "–", format_hours(usage.seconds))
    start, tokens, drop = c.frame.initial_value(COMPARISON_METRIC), c.trial.tokens, c.trial.change(CHOSEN)
    gain = "–" if start is None or c.value is None else format_signed(c.value - start)
    return (
        gain,
        format_brief(c.trial.last(MARGIN)),
        "–" if drop is None else format_signed(drop),
        format_brief(c.trial.last(EXACT)),
        trials,
        "–" if tokens is None else format_count(tokens),
        format_hours(usage.seconds),
    )


def print_comparison(found: SweepComparison, console: Console) -> None:
    """The table, the judgement, the warnings."""
    for total in (True, False):
        table, needed = _table(found, total)
        if needed <= console.width:
            console.print(table)
            break
    else:
        _print_narrow(found, console)
    console.print(Text(comparison_summary(found), style="bold"), soft_wrap=True)
    for warning in found.warnings:
        console.print(Text(f"! {warning}", style="yellow"), soft_wrap=True)


def _table(found: SweepComparison, total: bool) -> tuple[RichTable, int]:
    """A row a sweep, and the columns it needs; configurations may be broken over lines."""
    table = RichTable(box=box.SIMPLE_HEAD, pad_edge=False)
    for k, name in enumerate((*HEAD, *EXTRA_HEAD) if total else HEAD):
        folds = k == _CONFIGURATION
        right = k in (0, 5, 6) or k >= len(HEAD)
        table.add_column(name, justify="right" if right else "left", min_width=_FOLDED if folds else None)
    longest = 0
    for rank_number, c in enumerate(found.sweeps, 1):
        cells = (*table_row(c, rank_number), *extra_columns(c)) if total else table_row(c, rank_number)
        longest = max(longest, len(cells[_CONFIGURATION]))
        table.add_row(*(Text(cell, style="bold green" if rank_number == 1 else "") for cell in cells))
    unbounded = Console(width=1000, height=100)  # both: on a dumb terminal rich goes by 80 columns else
    widest = Measurement.get(unbounded, unbounded.options, table).maximum
    return table, widest - max(0, longest - _FOLDED)


def _print_narrow(found: SweepComparison, console: Console) -> None:
    """A few lines a sweep, for terminals in which the table would cut names and values."""
    for rank_number, c in enumerate(found.sweeps, 1):
        rank, sweep, objective, trial, text, value, behind = table_row(c, rank_number)
        head = f"{rank}  {sweep} ({objective}), trial {trial}: {HEAD[5]} {value}"
        console.print(Text(head, style="bold green" if rank_number == 1 else "bold"))
        for line in (text, "" if behind == "–" else f"behind by {behind}"):
            if line:
                console.print(Padding(Text(line), (0, 0, 0, 3), expand=False))
