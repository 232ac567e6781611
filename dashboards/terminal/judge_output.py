"""Table of judgements on the terminal, and progress of judging."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Sequence
from textwrap import wrap
from types import TracebackType
from typing import Self

from rich import box
from rich.console import Console
from rich.status import Status
from rich.table import Table
from rich.text import Text

from dashboards.formatting import format_measured, table_width
from orchestrator.judge.judgements import Judgement, Rate
from orchestrator.judge.win_rates import joint_win_rate

_LOG_INTERVAL = 15.0
"""Seconds between progress lines of piped output."""
_DIGITS = re.compile(r"\d[\d,]*")


class JudgeProgress:
    """Progress of judging: one updated line on a terminal, else a line per stage and every 15 seconds."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._status: Status | None = None
        self._logged_at = 0.0
        self._step = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, reason: BaseException | None, at: TracebackType | None
    ) -> None:
        self.pause()

    def set_activity(self, text: str) -> None:
        """Show the current stage."""
        if self._console.is_terminal:
            if self._status is None:
                self._status = self._console.status(Text(text))
                self._status.start()
            self._status.update(Text(text))
            return
        step = _DIGITS.sub("", text)
        if step != self._step or time.monotonic() - self._logged_at >= _LOG_INTERVAL:
            self._step, self._logged_at = step, time.monotonic()
            self.log(text)

    def log(self, text: str) -> None:
        """Print a line above the progress."""
        self._console.print(Text(text), soft_wrap=not self._console.is_terminal)

    def pause(self) -> None:
        """Stop drawing, so that other output can follow; `set_activity` starts it again."""
        if self._status is not None:
            self._status.stop()
            self._status = None


HEAD = ("trial", "judge", "answers", "win rate (95 %)", "at equal length", "wins", "ties", "losses", "first shown")
EXTRA_HEAD = ("same in both orders", "characters", "score", "no vote", "cost")


def table_row(judgement: Judgement) -> tuple[str, ...]:
    """Return the cells of the columns in HEAD."""
    judge_name = {"checker": "checker", "reward": "reward model"}.get(judgement.judge, judgement.judge_name)
    counts = tuple(map(str, (judgement.wins, judgement.ties, judgement.losses)))
    return (
        str(judgement.trial),
        judge_name,
        judgement.decoding,
        format_rate(judgement.win_rate),
        format_rate(judgement.lc_win_rate),
        *counts,
        "–" if judgement.first_position_rate is None else f"{judgement.first_position_rate.value:.0%}",
    )


def extra_rows(judgements: Sequence[Judgement]) -> list[tuple[str, ...]]:
    """Return the cells of the columns in EXTRA_HEAD, for wide terminals and the page."""
    scores = format_measured([s for judgement in judgements for s in (judgement.score, judgement.initial_score)])
    costs = [None if judgement.usage is None else judgement.usage.cost for judgement in judgements]
    return [
        (
            "–" if judgement.order_agreement is None else f"{judgement.order_agreement:.0%}",
            f"{judgement.length:.0f} ({judgement.initial_length:.0f})",
            "–" if judgement.score is None else f"{scores[2 * k]} ({scores[2 * k + 1]})",
            str(judgement.left_out),
            "–" if (cost := costs[k]) is None else f"{cost:.2f}",
        )
        for k, judgement in enumerate(judgements)
    ]


def format_rate(found: Rate | None) -> str:
    """Format a rate with its interval in percent; "–" for None."""
    return "–" if found is None else f"{found.value:.0%} ({found.low:.0%} … {found.high:.0%})"


def joint_conclusion(judgements: Sequence[Judgement]) -> str:
    """Return which trials' answers are clearly better or worse, counting that several were judged; "" for one each."""
    parts: list[str] = []
    for judgement in judgements:
        if judgement.win_rate is None:
            continue
        rate, count = joint_win_rate(judgement, judgements)
        if count > 1 and rate.is_clear:
            better = "better" if rate.value > 0.5 else "worse"
            parts.append(f"trial {judgement.trial} is {better} ({judgement.key.replace('_', ', ')})")
    several = any(j.win_rate is not None and joint_win_rate(j, judgements)[1] > 1 for j in judgements)
    if not several:
        return ""
    return f"For all judged trials together (95 %): {'; '.join(parts) or 'none differs from the initial model'}."


def _lines(judgement: Judgement) -> Text:
    """Return a judgement on three lines, for a terminal in which the table's cells would be cut."""
    trial, judge_name, decoding, win_rate, at_equal_length, wins, ties, losses, first = table_row(judgement)
    return Text(
        f"trial {trial}, {judge_name}, {decoding} answers: win rate {win_rate}\n"
        f"   at equal length {at_equal_length}\n"
        f"   wins {wins}, ties {ties}, losses {losses}, first shown {first}"
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], judgements: Sequence[Judgement]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for k, name in enumerate(head):
        table.add_column("\n".join(wrap(name, 15)), justify="left" if k in (1, 2) else "right")
    for cells, judgement in zip(rows, judgements, strict=True):
        clear = judgement.win_rate is not None and joint_win_rate(judgement, judgements)[0].is_clear
        style = "" if not clear or judgement.win_rate is None else "green" if judgement.win_rate.value > 0.5 else "red"
        table.add_row(*(Text(cell, style=style) for cell in cells))
    return table


def print_judgements(judgements: Sequence[Judgement], console: Console) -> None:
    """Print one row per judgement, with the extra columns on a wide terminal; three lines each on a narrow one."""
    if not judgements:
        console.print(Text("No judgements yet.", style="yellow"))
        return
    tables = (
        _table(
            (*HEAD, *EXTRA_HEAD),
            [(*table_row(each), *extra) for each, extra in zip(judgements, extra_rows(judgements), strict=True)],
            judgements,
        ),
        _table(HEAD, map(table_row, judgements), judgements),
    )
    fitting = next((t for t in tables if table_width(t).maximum <= console.width), None)
    for shown in [fitting] if fitting is not None else map(_lines, judgements):
        console.print(shown)
    in_brackets = "the 95 % interval of each trial by itself"
    if fitting is tables[0]:
        in_brackets += "; after characters and score, the initial model's"
    console.print(Text(f"Against the initial model; ties count half. In brackets: {in_brackets}.", style="dim"))
    if conclusion := joint_conclusion(judgements):
        console.print(Text(conclusion, style="dim"))
