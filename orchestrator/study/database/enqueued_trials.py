"""`TrialQueue`: trials enqueued by users, which run before trials proposed by the sampler.

A row is marked as issued in the transaction that creates its trial, so a kill at any time neither loses nor repeats it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row, func, insert, select, update

from orchestrator.study.database import tables
from orchestrator.study.database.tables import ENQUEUED, FORK
from orchestrator.study.trial_records import Fork


@dataclass(frozen=True, slots=True)
class EnqueuedTrial:
    """An enqueued trial: the settings it sets over the base (`leaves`) and its origin as text."""

    seq: int
    at: float
    leaves: Mapping[str, Any]
    origin: str
    by_hand: bool
    """Enqueued while the sweep runs: before those of the file, and on top of `budget.trials`."""
    parent: int | None = None
    """The trial that it is a clone of."""
    trial: int | None = None
    """Its trial number, once issued."""
    fork: Fork | None = None
    """The parent's checkpoint that it continues from."""


class TrialQueue:
    """One sweep's enqueued trials: those of commands before those of the file, each in order of arrival."""

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
        """Append a trial; return its sequence number."""
        last = select(func.coalesce(func.max(ENQUEUED.c.seq), 0)).where(ENQUEUED.c.sweep == self._sweep)
        seq = int(c.execute(last).scalar_one()) + 1
        row = {"leaves": json.dumps(dict(leaves), allow_nan=False), "origin": origin, "by_hand": by_hand}
        c.execute(insert(ENQUEUED).values(sweep=self._sweep, seq=seq, at=time.time(), parent=parent, **row))
        if fork is not None:
            c.execute(insert(FORK).values(sweep=self._sweep, seq=seq, step=fork.step, place=fork.place))
        return seq

    def all(self, c: Connection) -> list[EnqueuedTrial]:
        """Return waiting and issued trials, by sequence number."""
        return self._from_rows(
            c, c.execute(select(ENQUEUED).where(ENQUEUED.c.sweep == self._sweep).order_by(ENQUEUED.c.seq))
        )

    def _from_rows(self, c: Connection, rows: Iterable[Row[Any]]) -> list[EnqueuedTrial]:
        fork_rows = c.execute(select(FORK).where(FORK.c.sweep == self._sweep))
        forks = {r.seq: Fork(r.step, r.place) for r in fork_rows}
        return [
            EnqueuedTrial(r.seq, r.at, json.loads(r.leaves), r.origin, r.by_hand, r.parent, r.trial, forks.get(r.seq))
            for r in rows
        ]

    def waiting(self, c: Connection) -> list[EnqueuedTrial]:
        """Return the trials that were not issued yet, the next one first."""
        rows = list(c.execute(tables.WAITING_TRIALS, {"of_sweep": self._sweep}))
        return sorted(self._from_rows(c, rows), key=lambda g: (not g.by_hand, g.seq)) if rows else []

    def mark_issued(self, c: Connection, enqueued: EnqueuedTrial, trial: int) -> None:
        """Record the number of the trial that was issued."""
        condition = (ENQUEUED.c.sweep == self._sweep) & (ENQUEUED.c.seq == enqueued.seq)
        c.execute(update(ENQUEUED).where(condition).values(trial=trial))
