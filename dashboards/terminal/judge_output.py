"""A judge's verdicts on the terminal, and what is said while it works."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Sequence
from textwrap import wrap
from types import TracebackType
from typing import Self

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.status import Status
from rich.table import Table
from rich.text import Text

from dashboards.analysis.sweep_frame import show
from orchestrator.judge.judgements import Rate, Verdict

_EVERY = 15.0
"""Seconds between lines of progress where output is piped."""
_DIGITS = re.compile(r"\d[\d,]*")


class Talk:
    """On a terminal one line that redraws itself; piped, a line per step of the work and one now and then."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._status: Status | None = None
        self._told_at = 0.0
        self._step = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, why: BaseException | None, at: TracebackType | None) -> None:
        self.pause()

    def stage(self, text: str) -> None:
        """What is being done now."""
        if self._console.is_terminal:
            if self._status is None:
                self._status = self._console.status(Text(text))
                self._status.start()
            self._status.update(Text(text))
            return
        step = _DIGITS.sub("", text)
        if step != self._step or time.monotonic() - self._told_at >= _EVERY:
            self._step, self._told_at = step, time.monotonic()
            self.say(text)

    def say(self, text: str) -> None:
        """A line that stays."""
        self._console.print(Text(text), soft_wrap=True)

    def pause(self) -> None:
        """Leave the terminal to somebody else."""
        if self._status is not None:
            self._status.stop()
            self._status = None


HEAD = ("trial", "judge", "answers", "win rate (95 %)", "at equal length", "wins", "ties", "losses", "first shown")
MORE = ("same in both orders", "characters", "score", "no verdict", "cost")


def row(verdict: Verdict) -> tuple[str, ...]:
    """What always fits, as HEAD names it."""
    by = {"checker": "checker", "reward": "reward model"}.get(verdict.judge, verdict.by)
    counts = tuple(map(str, (verdict.wins, verdict.ties, verdict.losses)))
    return (
        str(verdict.trial),
        by,
        verdict.decoding,
        rate(verdict.win_rate),
        rate(verdict.lc_win_rate),
        *counts,
        "–" if verdict.first is None else f"{verdict.first.value:.0%}",
    )


def more(verdict: Verdict) -> tuple[str, ...]:
    """What is good to know beside it, as MORE names it."""
    agree = "–" if verdict.agree is None else f"{verdict.agree:.0%}"
    cost = None if verdict.asked is None else verdict.asked.cost
    score = "–" if verdict.score is None else f"{show(verdict.score)} ({show(verdict.start_score)})"
    return (
        agree,
        f"{verdict.length:.0f} ({verdict.start_length:.0f})",
        score,
        str(verdict.left_out),
        "–" if cost is None else f"{cost:.2f}",
    )


def rate(found: Rate | None) -> str:
    """A share with its interval, in per cent."""
    return "–" if found is None else f"{found.value:.0%} ({found.low:.0%} … {found.high:.0%})"


def _lines(verdict: Verdict) -> Text:
    """For a terminal in which the table's cells would be cut."""
    trial, by, decoding, won, level, wins, ties, losses, first = row(verdict)
    return Text(
        f"trial {trial}, {by}, {decoding} answers: win rate {won}\n"
        f"   at equal length {level}\n"
        f"   wins {wins}, ties {ties}, losses {losses}, first shown {first}"
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], verdicts: Sequence[Verdict]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for k, name in enumerate(head):
        table.add_column("\n".join(wrap(name, 15)), justify="left" if k in (1, 2) else "right")
    for cells, verdict in zip(rows, verdicts, strict=True):
        clear = verdict.win_rate is not None and verdict.win_rate.clear
        style = "" if not clear or verdict.win_rate is None else "green" if verdict.win_rate.value > 0.5 else "red"
        table.add_row(*(Text(cell, style=style) for cell in cells))
    return table


def print_verdicts(verdicts: Sequence[Verdict], console: Console) -> None:
    """One row a verdict, on a wide terminal with what is good to know beside it; some lines each on a narrow one."""
    if not verdicts:
        console.print(Text("No verdict yet.", style="yellow"))
        return
    tables = (
        _table((*HEAD, *MORE), [(*row(v), *more(v)) for v in verdicts], verdicts),
        _table(HEAD, map(row, verdicts), verdicts),
    )
    unbounded = console.options.update(width=1000)
    fitting = next((t for t in tables if Measurement.get(console, unbounded, t).maximum <= console.width), None)
    for shown in [fitting] if fitting is not None else map(_lines, verdicts):
        console.print(shown)
    console.print(Text("Against the start model; ties count half. In brackets: the start model's.", style="dim"))
