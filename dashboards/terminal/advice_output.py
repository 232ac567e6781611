"""Output of `orchestrate advise`, and the part of it that `plan` shows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dashboards.formatting import wide_console

if TYPE_CHECKING:
    from orchestrator.commands.advice.advise_sweep import SweepAdvice
    from orchestrator.spec.advice.advice_lines import AdviceLine
    from orchestrator.spec.advice.pair_scores import MarginEffect, PairScores

_COLORS = {"keep": "green", "change": "yellow", "warning": "red", "note": "bright_black"}


def print_advice(advice: SweepAdvice) -> None:
    """Print what was scored, the gaps, the margins, then each line of advice with reason, sources and YAML."""
    console = wide_console(highlight=False)
    scores = advice.scores
    if scores is not None:
        _print_pairs(console, advice.name, scores)
    if advice.margins:
        _print_margins(console, advice.margins)
    print_lines(console, advice.lines)


def _print_pairs(console: Console, name: str, scores: PairScores) -> None:
    from orchestrator.spec.advice.pair_scores import Distribution

    split = "training" if scores.split == "train" else "held-out"
    part = f"{len(scores.chosen):,} of {scores.pairs_in_split:,}" if scores.is_sample else f"{scores.pairs_in_split:,}"
    if not scores.paired:
        desirable, undesirable = scores.labels
        labels = f"{desirable:,} desirable and {undesirable:,} undesirable responses"
        title = f"advice for {name}: {part} {split} rows, {labels}, under {scores.initial_model}"
        console.print(Text(title, style="bold"))
        return
    gaps = Distribution.of(scores.gaps)
    listed = ", ".join(f"{q[1:]} % {value:+.3f}" for q, value in gaps.percentiles.items())
    console.print(Text(f"advice for {name}: {part} {split} pairs under {scores.initial_model}", style="bold"))
    console.print(
        Text(f"gap per token, chosen minus rejected, in nats: {listed}; mean {gaps.mean:+.3f}, sd {gaps.sd:.3f}"),
        soft_wrap=not console.is_terminal,
    )


def _print_margins(console: Console, margins: Sequence[MarginEffect]) -> None:
    title = "searched margins at the start of training"
    table = Table(title=title, box=None, title_justify="left", header_style="bold", min_width=len(title))
    for column in ("beta", "gamma / beta", "gamma", "pairs beyond", "mean weight", "effective pairs"):
        table.add_column(column, justify="right")
    for one in margins:
        table.add_row(
            f"{one.beta:g}", f"{one.ratio:.3g}", f"{one.ratio * one.beta:.3g}", f"{one.beyond:.1%}",
            f"{one.weight:.3f}", f"{one.effective:.0%}",
        )  # fmt: skip
    console.print(table)


def print_lines(console: Console, lines: Sequence[AdviceLine]) -> None:
    """Print lines of advice: topic and level, the finding, the value to write, the reason with its sources."""
    for line in lines:
        console.print(
            Text.assemble((f"{line.level}: ", _COLORS[line.level]), (f"{line.topic}: ", "bold"), line.text),
            soft_wrap=not console.is_terminal,
        )
        if line.setting is not None:
            now = f"{line.setting}: {line.current}"
            console.print(Text(f"  {now}" if line.value is None else f"  {line.yaml}    # now {line.current}"))
        sources = f" [{'; '.join(line.sources)}]" if line.sources else ""
        console.print(Text(f"  {line.reason}{sources}", style="bright_black"), soft_wrap=not console.is_terminal)


def print_advice_of_plan(console: Console, lines: Sequence[AdviceLine]) -> None:
    """Print the advice that changes or warns in full, and in a sentence which settings need no change."""
    if not lines:
        return
    console.print("advice", style="bold")
    shown = [line for line in lines if line.level in ("change", "warning")]
    print_lines(console, shown)
    kept = list(dict.fromkeys(line.topic for line in lines if line.level == "keep" and line not in shown))
    if kept:
        console.print(
            Text(_kept_text([_SUBJECTS.get(topic, f"the {topic}") for topic in kept])),
            soft_wrap=not console.is_terminal,
        )
    if not any(line.topic == "right already" for line in lines):
        console.print("note: `orchestrate advise` scores the pairs under the initial model", markup=False)


_SUBJECTS = {"beta": "beta", "batch": "the number of pairs per update", "duration": "the number of updates"}
"""Topic of advice -> the words for it in a sentence, where these are not the topic with an article."""


def _kept_text(subjects: Sequence[str]) -> str:
    listed = f"{', '.join(subjects[:-1])} and {subjects[-1]} need" if len(subjects) > 1 else f"{subjects[0]} needs"
    return f"{listed[:1].upper()}{listed[1:]} no change."
