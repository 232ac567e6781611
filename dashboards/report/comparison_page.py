"""The comparison as a page, in the panels of the report, and as a table for the terminal."""

from __future__ import annotations

import dataclasses

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Table as RichTable
from rich.text import Text

from dashboards.analysis.comparison import CHOSEN, EXACT, MARGIN, Comparison, Contender
from dashboards.analysis.run_costs import costs
from dashboards.analysis.sweep_frame import brief, signed
from dashboards.diagnosis.diagnose import diagnose
from dashboards.diagnosis.findings import Level
from dashboards.report.blocks import Block, Fact, Facts, Findings, Panel, Table, Words
from dashboards.report.html_page import page
from dashboards.report.panels import PANELS
from dashboards.report.panels.trials_and_cost import short_count, show_hours
from trainer.metrics import COMMON_RULER

HEAD = ("", "sweep", "objective", "trial", "configuration", COMMON_RULER.removeprefix("eval_"), "behind by (95 %)")
_CONFIGURATION, _FOLDED = 4, 22
"""The column that may be broken over lines, and to how many characters."""
MORE = ("gain", "margin", "chosen log-prob", "right answers", "trials", "tokens", "slot-hours")


def compare_page(found: Comparison) -> str:
    """One HTML file, like the report."""
    frame = found.seen.frame
    panels = [_ranking(found), *(panel for draw in PANELS if (panel := draw(found.seen)) is not None)]
    shown = [_renamed(panel) for panel in panels if panel.key != "diagnosis"]
    title = " · ".join(frame.sweeps)
    words = f"{len(frame.sweeps)} sweeps by one ruler: {COMMON_RULER}, which no objective and no beta scales."
    return page(shown, kind="comparison", title=title, description=words, state=frame.state, at=frame.at)


def _renamed(panel: Panel) -> Panel:
    return dataclasses.replace(panel, title="All their trials") if panel.key == "answer" else panel


def _ranking(found: Comparison) -> Panel:
    first = found.contenders[0]
    blocks: list[Block] = []
    if first.case is None:
        blocks.append(Words("No trial of these sweeps completed.", strong=True))
    else:
        facts = [
            Fact(
                f"first: {first.frame.name}, trial {first.case.label}", first.frame.words(first.case) or first.objective
            ),
            Fact(COMMON_RULER, brief(first.value)),
        ]
        blocks += [Facts(tuple(facts)), Words(verdict(found), strong=True)]
    if found.warnings:
        blocks.append(Table(("what to know before believing it",), tuple((line,) for line in found.warnings)))
    first_row = frozenset({0})
    rows = tuple(row(c, place) for place, c in enumerate(found.contenders, 1))
    blocks.append(Table(HEAD, rows, frozenset({0, 5, 6}), marked=first_row))
    beside = tuple((c.frame.name, *more(c)) for c in found.contenders)
    blocks.append(Table(("sweep", *MORE), beside, frozenset(range(1, 1 + len(MORE))), marked=first_row))
    serious = tuple(
        dataclasses.replace(finding, title=f"{c.frame.name}: {finding.title[:1].lower()}{finding.title[1:]}")
        for c in found.contenders
        for finding in diagnose(c.frame)
        if finding.level is Level.SERIOUS
    )
    if serious:
        blocks.append(Findings(serious))
    return Panel("ranking", "Who is first", "The best trial of each sweep.", blocks)


def verdict(found: Comparison) -> str:
    """Who is first, and whether that is clear."""
    first, *others = found.contenders
    if first.case is None:
        return "No trial of these sweeps completed."
    tied = [c for c in others if c.behind is not None and not c.behind.clear]
    unknown = [c for c in others if c.case is not None and c.behind is None]
    words = f"{first.frame.name} ({first.objective}) is first with {COMMON_RULER} = {brief(first.value)}"
    if tied:
        words += "; it cannot be told apart from " + ", ".join(c.frame.name for c in tied)
    elif others and not unknown:
        words += ", clearly ahead of every other"
    if unknown:
        words += "; how sure that is against " + ", ".join(c.frame.name for c in unknown) + " cannot be told"
    return words + "."


def row(c: Contender, place: int) -> tuple[str, ...]:
    """What always fits."""
    if c.case is None:
        return ("–", c.frame.name, c.objective, "–", "no trial completed", "–", "–")
    behind = "–" if c.behind is None else f"{brief(c.behind.mean)} ({signed(c.behind.low)} … {signed(c.behind.high)})"
    return (str(place), c.frame.name, c.objective, c.case.label, c.frame.words(c.case), brief(c.value), behind)


def more(c: Contender) -> tuple[str, ...]:
    """What is good to know beside it."""
    spent = costs(c.frame.trials)
    trials = f"{len(c.frame.ranked)}/{len(c.frame.trials)}"
    if c.case is None:
        return ("–", "–", "–", "–", trials, "–", show_hours(spent.seconds))
    start, tokens, drop = c.frame.start(COMMON_RULER), c.case.tokens, c.case.change(CHOSEN)
    gain = "–" if start is None or c.value is None else signed(c.value - start)
    return (
        gain,
        brief(c.case.last(MARGIN)),
        "–" if drop is None else signed(drop),
        brief(c.case.last(EXACT)),
        trials,
        "–" if tokens is None else short_count(tokens),
        show_hours(spent.seconds),
    )


def print_comparison(found: Comparison, console: Console) -> None:
    """The table, the verdict, the warnings."""
    for whole in (True, False):
        table, needed = _table(found, whole)
        if needed <= console.width:
            console.print(table)
            break
    else:
        _print_narrow(found, console)
    console.print(Text(verdict(found), style="bold"), soft_wrap=True)
    for warning in found.warnings:
        console.print(Text(f"! {warning}", style="yellow"), soft_wrap=True)


def _table(found: Comparison, whole: bool) -> tuple[RichTable, int]:
    """A row a sweep, and the columns it needs; configurations may be broken over lines."""
    table = RichTable(box=box.SIMPLE_HEAD, pad_edge=False)
    for k, name in enumerate((*HEAD, *MORE) if whole else HEAD):
        folds = k == _CONFIGURATION
        right = k in (0, 5, 6) or k >= len(HEAD)
        table.add_column(name, justify="right" if right else "left", min_width=_FOLDED if folds else None)
    longest = 0
    for place, c in enumerate(found.contenders, 1):
        cells = (*row(c, place), *more(c)) if whole else row(c, place)
        longest = max(longest, len(cells[_CONFIGURATION]))
        table.add_row(*(Text(cell, style="bold green" if place == 1 else "") for cell in cells))
    unbounded = Console(width=1000, height=100)  # both: on a dumb terminal rich goes by 80 columns else
    widest = Measurement.get(unbounded, unbounded.options, table).maximum
    return table, widest - max(0, longest - _FOLDED)


def _print_narrow(found: Comparison, console: Console) -> None:
    """A few lines a sweep, for terminals in which the table would cut names and values."""
    for place, c in enumerate(found.contenders, 1):
        rank, sweep, objective, trial, words, value, behind = row(c, place)
        head = f"{rank}  {sweep} ({objective}), trial {trial}: {HEAD[5]} {value}"
        console.print(Text(head, style="bold green" if place == 1 else "bold"))
        for line in (words, "" if behind == "–" else f"behind by {behind}"):
            if line:
                console.print(Padding(Text(line), (0, 0, 0, 3), expand=False))
