"""Comparison of sweeps as an HTML page with the report's panels, and as a terminal table."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table as RichTable
from rich.text import Text

from dashboards.analysis.comparison import SweepComparison, lacks_comparison
from dashboards.analysis.run_costs import costs
from dashboards.analysis.sweep_frame import SweepFrame
from dashboards.diagnosis.findings import lower_first
from dashboards.formatting import (
    format_brief,
    format_count,
    format_hours,
    format_intervals,
    format_measured,
    table_width,
)
from dashboards.report.blocks import Block, Findings, KeyFigure, KeyFigures, Panel, Paragraph, Table
from dashboards.report.html_page import render_page
from dashboards.report.panels import PANELS
from trainer.metrics import CHOSEN, COMPARISON_METRIC, EXACT_ANSWERS, MARGIN

HEAD = ("", "sweep", "objective", "trial", "configuration", COMPARISON_METRIC.removeprefix("eval_"), "behind by (95 %)")
_CONFIGURATION, _FOLDED = 4, 22
"""Column that may wrap, and its width in characters then."""
EXTRA_HEAD = ("gain", "margin", "chosen log-prob", "right answers", "trials", "tokens", "slot-hours")


def comparison_page(found: SweepComparison) -> str:
    """Return the comparison as one self-contained HTML page."""
    frame = found.analysis.frame
    shown, text = comparison_panels(found)
    title = " · ".join(frame.sweeps)
    return render_page(shown, kind="comparison", title=title, description=text, state=frame.state, at=frame.at)


def comparison_panels(found: SweepComparison) -> tuple[list[Panel], str]:
    """Return the panels of a comparison, and by what it compares."""
    panels = [_ranking(found), *(panel for draw in PANELS if (panel := draw(found.analysis)) is not None)]
    count = len(found.analysis.frame.sweeps)
    text = f"{count} sweeps by {COMPARISON_METRIC}, a metric that neither the loss nor beta scales."
    return [_rename_panel(panel) for panel in panels if panel.key != "diagnosis"], text


def _rename_panel(panel: Panel) -> Panel:
    return dataclasses.replace(panel, title="All trials") if panel.key == "answer" else panel


def _ranking(found: SweepComparison) -> Panel:
    first = found.sweeps[0]
    blocks: list[Block] = []
    if first.trial is None:
        blocks.append(Paragraph("No trial of these sweeps completed.", strong=True))
    else:
        figures = [
            KeyFigure(
                f"first: {first.frame.name}, trial {first.trial.label}",
                first.frame.describe_params(first.trial) or first.loss_name,
            ),
            KeyFigure(COMPARISON_METRIC, format_brief(first.value)),
        ]
        blocks += [KeyFigures(tuple(figures)), Paragraph(comparison_summary(found), strong=True)]
    if found.warnings:
        blocks.append(Table(("limits of this comparison",), tuple((line,) for line in found.warnings)))
    first_row = frozenset({0})
    blocks.append(Table(HEAD, table_rows(found), frozenset({0, 5, 6}), marked=first_row))
    extra = tuple((sweep.frame.name, *row) for sweep, row in zip(found.sweeps, extra_rows(found), strict=True))
    blocks.append(Table(("sweep", *EXTRA_HEAD), extra, frozenset(range(1, 1 + len(EXTRA_HEAD))), marked=first_row))
    if found.serious:
        blocks.append(Findings(found.serious))
    return Panel("ranking", "Ranking", "The best trial of each sweep.", blocks)


def comparison_summary(found: SweepComparison) -> str:
    """Return one sentence: the best sweep, and from which others it is not distinguishable."""
    first, *others = found.sweeps
    if first.trial is None:
        if any(lacks_comparison(sweep.frame) for sweep in found.sweeps):
            return f"No trial of these sweeps measured {COMPARISON_METRIC}, by which sweeps are compared."
        broken = [sweep.frame for sweep in found.sweeps if sweep.frame.ranked]
        if broken:
            listed = " ".join(f"{frame.name}: {lower_first(frame.requirements_text)}." for frame in broken)
            return f"No trial of these sweeps can be compared. {listed}"
        return "No trial of these sweeps completed."
    indistinguishable = [sweep for sweep in others if sweep.behind is not None and not sweep.behind.is_clear]
    unknown = [sweep for sweep in others if sweep.trial is not None and sweep.behind is None]
    text = f"{first.frame.name} ({first.loss_name}) is first with {COMPARISON_METRIC} = {format_brief(first.value)}"
    if indistinguishable:
        text += "; it is not distinguishable from " + ", ".join(sweep.frame.name for sweep in indistinguishable)
    elif any(sweep.trial is not None for sweep in others) and not unknown:
        text += ", clearly ahead of all others"
    comparisons = max((sweep.behind.comparisons for sweep in others if sweep.behind is not None), default=1)
    if comparisons > 1 and (indistinguishable or not unknown):
        text += f" (95 % intervals for all {comparisons:,} pairs of their trials together)"
    for sweep in others:
        if sweep.trial is None:
            text += f"; {sweep.frame.name} has none to compare, as {_without_trial(sweep.frame)}"
    if unknown:
        text += "; the significance against " + ", ".join(sweep.frame.name for sweep in unknown) + " is unknown"
    return text + "."


def table_rows(found: SweepComparison) -> tuple[tuple[str, ...], ...]:
    """Return the cells of the columns in HEAD, which fit most terminals."""
    values = format_measured([sweep.value for sweep in found.sweeps], 3)
    differences = [sweep.behind if sweep.trial is not None else None for sweep in found.sweeps]
    behind = format_intervals([None if d is None else (d.mean, d.joint_low, d.joint_high) for d in differences])
    return tuple(
        ("–", sweep.frame.name, sweep.loss_name, "–", _without_trial(sweep.frame), "–", "–")
        if sweep.trial is None
        else (
            str(k + 1),
            sweep.frame.name,
            sweep.loss_name,
            sweep.trial.label,
            sweep.frame.describe_params(sweep.trial) or "the only configuration",
            values[k],
            behind[k],
        )
        for k, sweep in enumerate(found.sweeps)
    )


def _without_trial(frame: SweepFrame) -> str:
    if lacks_comparison(frame):
        return f"no {COMPARISON_METRIC.removeprefix('eval_')}"
    return "no trial keeps the requirements" if frame.ranked else "no trial completed"


def extra_rows(found: SweepComparison) -> tuple[tuple[str, ...], ...]:
    """Return the cells of the columns in EXTRA_HEAD, for wide terminals and the page."""
    trials = [sweep.trial for sweep in found.sweeps]
    starts = [sweep.frame.initial_value(COMPARISON_METRIC) for sweep in found.sweeps]
    gains = [
        None if start is None or sweep.value is None or sweep.trial is None else sweep.value - start
        for start, sweep in zip(starts, found.sweeps, strict=True)
    ]
    measured = [
        format_measured(gains, 3, signed=True),
        format_measured([None if trial is None else trial.last(MARGIN) for trial in trials], 3),
        format_measured([None if trial is None else trial.change(CHOSEN) for trial in trials], 3, signed=True),
        format_measured([None if trial is None else trial.last(EXACT_ANSWERS) for trial in trials], 3),
    ]
    return tuple(
        (
            *(column[k] for column in measured),
            f"{len(sweep.frame.ranked)}/{len(sweep.frame.trials)}",
            "–" if sweep.trial is None or sweep.trial.tokens is None else format_count(sweep.trial.tokens),
            format_hours(costs(sweep.frame.all_trials).seconds),
        )
        for k, sweep in enumerate(found.sweeps)
    )


@dataclass(frozen=True, slots=True)
class ComparisonTable:
    """A comparison as a terminal shows it; `from_json` reads what a service has answered."""

    rows: tuple[tuple[str, ...], ...]
    """Cells of the columns in HEAD."""
    extra: tuple[tuple[str, ...], ...]
    """Cells of the columns in EXTRA_HEAD, one row for each of `rows`."""
    summary: str
    serious: tuple[str, ...]
    """Titles of the serious findings."""
    warnings: tuple[str, ...]

    @classmethod
    def of(cls, found: SweepComparison) -> ComparisonTable:
        """Return the texts of a comparison."""
        serious = tuple(finding.title for finding in found.serious)
        return cls(table_rows(found), extra_rows(found), comparison_summary(found), serious, tuple(found.warnings))

    @classmethod
    def from_json(cls, given: Mapping[str, Any]) -> ComparisonTable:
        """Return the table of its fields as JSON values."""
        cells = {name: tuple(tuple(row) for row in given[name]) for name in ("rows", "extra")}
        texts = {name: tuple(given[name]) for name in ("serious", "warnings")}
        return cls(**cells, **texts, summary=given["summary"])


def print_comparison(found: ComparisonTable, console: Console) -> None:
    """Print the table, the summary, the serious findings and the warnings."""
    for all_columns in (True, False):
        table, width = _table(found, all_columns)
        if width <= console.width:
            console.print(table)
            break
    else:
        _print_narrow(found, console)
    console.print(Text(found.summary, style="bold"), soft_wrap=not console.is_terminal)
    for title in found.serious:
        console.print(Text(f"serious: {title}", style="bold red"), soft_wrap=not console.is_terminal)
    for warning in found.warnings:
        console.print(Text(f"! {warning}", style="yellow"), soft_wrap=not console.is_terminal)


def _table(found: ComparisonTable, all_columns: bool) -> tuple[RichTable, int]:
    """Return a table with one row per sweep, and its width in characters with wrapped configurations."""
    table = RichTable(box=box.SIMPLE_HEAD, pad_edge=False)
    for k, name in enumerate((*HEAD, *EXTRA_HEAD) if all_columns else HEAD):
        folds = k == _CONFIGURATION
        right = k in (0, 5, 6) or k >= len(HEAD)
        table.add_column(name, justify="right" if right else "left", min_width=_FOLDED if folds else None)
    rows, longest = found.rows, 0
    if all_columns:
        rows = tuple((*row, *more) for row, more in zip(rows, found.extra, strict=True))
    for k, cells in enumerate(rows):
        longest = max(longest, len(cells[_CONFIGURATION]))
        table.add_row(*(Text(cell, style="" if k else "bold green") for cell in cells))
    return table, table_width(table).maximum - max(0, longest - _FOLDED)


def _print_narrow(found: ComparisonTable, console: Console) -> None:
    """Print a few lines per sweep, for terminals in which the table would cut names and values."""
    for k, (rank, name, objective, trial, text, value, behind) in enumerate(found.rows):
        head = f"{rank}  {name} ({objective}), trial {trial}: {HEAD[5]} {value}"
        console.print(Text(head, style="bold" if k else "bold green"))
        for line in (text, "" if behind == "–" else f"behind by {behind}"):
            if line:
                console.print(Padding(Text(line), (0, 0, 0, 3), expand=False))
