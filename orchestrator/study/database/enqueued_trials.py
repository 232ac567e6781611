"""`TrialQueue`: trials enqueued by users, which run before trials proposed by the sampler.

A row is marked as issued in the transaction that creates its trial, so a kill at any time neither loses nor repeats it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
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

    def as_json(self) -> dict[str, Any]:
        """Return the trial as JSON values."""
        return asdict(self) | {"fork": None if self.fork is None else self.fork.as_json()}


class TrialQueue:
    """One sweep's enqueued trials: those of commands before those of the file, each in order of arrival."""

    def __init__(self, sweep: str) -> None:
        self._sweep = sweep

    def add(
        self,
        connection: Connection,
        leaves: Mapping[str, Any],
        origin: str,
        *,
        by_hand: bool,
        parent: int | None = None,
        fork: Fork | None = None,
    ) -> int:
        """Append a trial; return its sequence number."""
        last = select(func.coalesce(func.max(ENQUEUED.c.seq), 0)).where(ENQUEUED.c.sweep == self._sweep)
        seq = int(connection.execute(last).scalar_one()) + 1
        row = {"leaves": json.dumps(dict(leaves), allow_nan=False), "origin": origin, "by_hand": by_hand}
        connection.execute(insert(ENQUEUED).values(sweep=self._sweep, seq=seq, at=time.time(), parent=parent, **row))
        if fork is not None:
            connection.execute(insert(FORK).values(sweep=self._sweep, seq=seq, **fork.as_json()))
        return seq

    def all(self, connection: Connection) -> list[EnqueuedTrial]:
        """Return waiting and issued trials, by sequence number."""
        return self._from_rows(
            connection,
            connection.execute(select(ENQUEUED).where(ENQUEUED.c.sweep == self._sweep).order_by(ENQUEUED.c.seq)),
        )

    def _from_rows(self, connection: Connection, rows: Iterable[Row[Any]]) -> list[EnqueuedTrial]:
        fork_rows = connection.execute(select(FORK).where(FORK.c.sweep == self._sweep))
        forks = {row.seq: Fork(row.step, row.place) for row in fork_rows}
        return [
            EnqueuedTrial(
                row.seq,
                row.at,
                json.loads(row.leaves),
                row.origin,
                row.by_hand,
                row.parent,
                row.trial,
                forks.get(row.seq),
            )
            for row in rows
        ]

    def waiting(self, connection: Connection) -> list[EnqueuedTrial]:
        """Return the trials that were not issued yet, the next one first."""
        rows = list(connection.execute(tables.WAITING_TRIALS, {"of_sweep": self._sweep}))
        return (
            sorted(self._from_rows(connection, rows), key=lambda enqueued: (not enqueued.by_hand, enqueued.seq))
            if rows
            else []
        )

    def mark_issued(self, connection: Connection, enqueued: EnqueuedTrial, trial: int) -> None:
        """Record the number of the trial that was issued."""
        condition = (ENQUEUED.c.sweep == self._sweep) & (ENQUEUED.c.seq == enqueued.seq)
        connection.execute(update(ENQUEUED).where(condition).values(trial=trial))
