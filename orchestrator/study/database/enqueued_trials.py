"""Trials given by people: a queue in the study, taken from before the policy is asked.

A row is taken in the transaction that creates its trial, so a kill at any instant neither loses nor doubles it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row, func, insert, select, update

from orchestrator.study.database import tables as made
from orchestrator.study.database.tables import FORK, GIVEN
from orchestrator.study.trial_records import Fork


@dataclass(frozen=True, slots=True)
class Given:
    """A trial that waits or was issued: the leaves it sets over the base, and where it comes from, in words."""

    seq: int
    at: float
    leaves: Mapping[str, Any]
    origin: str
    by_hand: bool
    """Asked for while the sweep goes on: runs next, and on top of `budget.trials`."""
    parent: int | None = None
    """The trial that it is a clone of."""
    trial: int | None = None
    """Its number, once issued."""
    fork: Fork | None = None
    """The parent's checkpoint that it goes on from."""


class Queue:
    """One sweep's given trials: by hand before the file's, each in the order in which they came."""

    def __init__(self, sweep: str) -> None:
        self._sweep = sweep

    def add(
        self,
        c: Connection,
        leaves: Mapping[str, Any],
        origin: str,
        *,
        by_hand: bool,
        parent: int | None = None,
        fork: Fork | None = None,
    ) -> int:
        """One more at the end; returns its place in the order."""
        last = select(func.coalesce(func.max(GIVEN.c.seq), 0)).where(GIVEN.c.sweep == self._sweep)
        seq = int(c.execute(last).scalar_one()) + 1
        row = {"leaves": json.dumps(dict(leaves), allow_nan=False), "origin": origin, "by_hand": by_hand}
        c.execute(insert(GIVEN).values(sweep=self._sweep, seq=seq, at=time.time(), parent=parent, **row))
        if fork is not None:
            c.execute(insert(FORK).values(sweep=self._sweep, seq=seq, step=fork.step, place=fork.place))
        return seq

    def all(self, c: Connection) -> list[Given]:
        """Waiting and issued ones, in order."""
        return self._made(c, c.execute(select(GIVEN).where(GIVEN.c.sweep == self._sweep).order_by(GIVEN.c.seq)))

    def _made(self, c: Connection, rows: Iterable[Row[Any]]) -> list[Given]:
        held = c.execute(select(FORK).where(FORK.c.sweep == self._sweep))
        forks = {r.seq: Fork(r.step, r.place) for r in held}
        return [
            Given(r.seq, r.at, json.loads(r.leaves), r.origin, r.by_hand, r.parent, r.trial, forks.get(r.seq))
            for r in rows
        ]

    def waiting(self, c: Connection) -> list[Given]:
        """Those that no trial was made of yet, the next one first."""
        rows = list(c.execute(made.GIVEN_WAITING, {"of_sweep": self._sweep}))
        return sorted(self._made(c, rows), key=lambda g: (not g.by_hand, g.seq)) if rows else []

    def taken(self, c: Connection, given: Given, trial: int) -> None:
        """This trial is made of it."""
        mine = (GIVEN.c.sweep == self._sweep) & (GIVEN.c.seq == given.seq)
        c.execute(update(GIVEN).where(mine).values(trial=trial))
