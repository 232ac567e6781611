"""Rows of our own tables: read and written inside a transaction that somebody else opened."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Table, delete, func, insert, select, update

from orchestrator.study.database import tables as made
from orchestrator.study.database.tables import (
    ATTEMPT,
    BEAT,
    DRIVER,
    EVENT,
    JUDGED,
    PAIRS,
    PROGRESS,
    REQUEST,
    SPEC,
    SWEEP,
)
from orchestrator.study.pruning.divergence_guard import as_number
from orchestrator.study.running_trial import Told
from orchestrator.study.trial_records import Event, Request, SpecVersion
from trainer.results import Point


@dataclass(frozen=True, slots=True)
class Identity:
    """The row that makes a study: its id is the sweep's in every other store."""

    id: str
    study_id: int
    schema: int
    driver: int


class Ledger:
    """One sweep's rows."""

    def __init__(self, sweep: str) -> None:
        self.sweep = sweep

    # --- the sweep -----------------------------------------------------------------------------------------------

    def identity(self, c: Connection, *, lock: bool = False) -> Identity | None:
        """The sweep's row; locked, other writers wait (SQLite's writers already do)."""
        row = c.execute(made.IDENTITY_LOCKED if lock else made.IDENTITY, {"of_sweep": self.sweep}).one_or_none()
        return None if row is None else Identity(row.id, row.study_id, row.schema, row.driver)

    def spec_versions(self, c: Connection) -> list[SpecVersion]:
        """Every accepted spec, oldest first."""
        query = select(SPEC).where(SPEC.c.sweep == self.sweep).order_by(SPEC.c.version)
        return [SpecVersion(r.version, r.at, r.hash, r.spec) for r in c.execute(query)]

    def add_spec(self, c: Connection, text: str, digest: str) -> None:
        """A new version of the spec."""
        version = self._next(c, SPEC, "version")
        c.execute(insert(SPEC).values(sweep=self.sweep, version=version, at=time.time(), hash=digest, spec=text))

    # --- drivers -------------------------------------------------------------------------------------------------

    def new_driver(self, c: Connection, holder: str) -> int:
        """A new driver's token; from here on only its writes are accepted."""
        token = self._next(c, DRIVER, "driver")
        c.execute(insert(DRIVER).values(sweep=self.sweep, driver=token, holder=holder, at=time.time(), seconds=0.0))
        c.execute(insert(BEAT).values(sweep=self.sweep, driver=token, beats=0))
        c.execute(update(SWEEP).where(SWEEP.c.sweep == self.sweep).values(driver=token))
        return token

    def holder(self, c: Connection, token: int) -> str:
        """Who has that token."""
        query = select(DRIVER.c.holder).where(DRIVER.c.sweep == self.sweep, DRIVER.c.driver == token)
        return c.execute(query).scalar_one()

    def nobody_drives(self, c: Connection, token: int) -> None:
        """That driver left; nothing changes where it is no longer the one."""
        mine = (SWEEP.c.sweep == self.sweep) & (SWEEP.c.driver == token)
        c.execute(update(SWEEP).where(mine).values(driver=0))

    def signs_of_life(self, c: Connection, token: int) -> tuple[float, int]:
        """Two numbers of that driver of which one grows while it lives: its working time, and its heartbeats.

        An older version of this program writes no heartbeats.
        """
        mine = (DRIVER.c.sweep == self.sweep) & (DRIVER.c.driver == token)
        beats = select(BEAT.c.beats).where(BEAT.c.sweep == self.sweep, BEAT.c.driver == token)
        seconds = float(c.execute(select(DRIVER.c.seconds).where(mine)).scalar_one())
        return seconds, int(c.execute(beats).scalar_one_or_none() or 0)

    def beat(self, c: Connection, token: int) -> None:
        """One more sign of life of this driver."""
        mine = (BEAT.c.sweep == self.sweep) & (BEAT.c.driver == token)
        c.execute(update(BEAT).where(mine).values(beats=BEAT.c.beats + 1))

    def worked(self, c: Connection, token: int, seconds: float) -> None:
        """How long this driver has been at it."""
        c.execute(made.DRIVER_WORKED, {"of_sweep": self.sweep, "of_driver": token, "worked": seconds})

    def seconds(self, c: Connection, but: int = 0) -> float:
        """All drivers' working time, leaving one out."""
        mine = (DRIVER.c.sweep == self.sweep) & (DRIVER.c.driver != but)
        return float(c.execute(select(func.coalesce(func.sum(DRIVER.c.seconds), 0.0)).where(mine)).scalar_one())

    # --- attempts ------------------------------------------------------------------------------------------------

    def begin_attempt(self, c: Connection, trial: int, attempt: int, gpus: float) -> None:
        """A worker gets this trial."""
        row = {"sweep": self.sweep, "trial": trial, "attempt": attempt, "at": time.time(), "gpus": gpus, "seconds": 0.0}
        c.execute(made.ADD_ATTEMPT, row)

    def attempt_worked(self, c: Connection, trial: int, attempt: int, seconds: float) -> None:
        """How long it has had it by now."""
        mine = {"of_sweep": self.sweep, "of_trial": trial, "of_attempt": attempt}
        c.execute(made.ATTEMPT_WORKED, mine | {"worked": seconds})

    def trial_seconds(self, c: Connection) -> dict[int, float]:
        """Time in workers' hands of every trial, all its attempts."""
        query = select(ATTEMPT.c.trial, func.sum(ATTEMPT.c.seconds)).where(ATTEMPT.c.sweep == self.sweep)
        return {trial: float(seconds) for trial, seconds in c.execute(query.group_by(ATTEMPT.c.trial))}

    def seconds_of_trial(self, c: Connection, trial: int) -> float:
        """Time in workers' hands of one trial, all its attempts."""
        return float(c.execute(made.SECONDS_OF_TRIAL, self._of(trial)).scalar_one())

    def gpu_seconds(self, c: Connection, but: Collection[tuple[int, int]] = ()) -> float:
        """Seconds of every attempt times the GPUs of its slot, leaving out some by trial and attempt."""
        mine = ATTEMPT.c.sweep == self.sweep
        for trial, attempt in but:
            mine &= ~((ATTEMPT.c.trial == trial) & (ATTEMPT.c.attempt == attempt))
        query = select(func.coalesce(func.sum(ATTEMPT.c.seconds * ATTEMPT.c.gpus), 0.0)).where(mine)
        return float(c.execute(query).scalar_one())

    # --- points --------------------------------------------------------------------------------------------------

    def told(self, c: Connection, trial: int) -> Told:
        """What there is of a trial by now."""
        found = self._progress_row(c, trial)
        if found is None:
            return Told()
        return Told({r.step for r in c.execute(made.POINTS, self._of(trial))}, *found)

    def add_points(self, c: Connection, trial: int, points: Sequence[Point], before: Told) -> Told:
        """New points, in any order, and with them the last value of every metric; what there is then."""
        rows = [{"sweep": self.sweep, "trial": trial, "step": p.step, "metrics": encode(p.metrics)} for p in points]
        c.execute(made.ADD_POINTS, rows)
        first, late = not before.steps, any(p.step < before.step for p in points)
        whole = self.points(c, trial) if late else sorted(points, key=lambda p: p.step)
        after = before.after(whole)
        row = {"step": after.step, "metrics": encode(after.last)}
        if first:
            c.execute(made.ADD_PROGRESS, {"sweep": self.sweep, "trial": trial} | row)
        else:
            c.execute(made.SET_PROGRESS, self._of(trial) | {"at": row["step"], "last": row["metrics"]})
        return after

    def points(self, c: Connection, trial: int) -> list[Point]:
        """All points of a trial by step."""
        return [Point(r.step, decode(r.metrics)) for r in c.execute(made.POINTS, self._of(trial))]

    def add_pairs(self, c: Connection, trial: int, points: Sequence[Point]) -> None:
        """What these points know of each held-out pair."""
        rows = [{"sweep": self.sweep, "trial": trial, "step": p.step, "pairs": p.pairs} for p in points if p.pairs]
        if rows:
            c.execute(made.ADD_PAIRS, rows)

    def pairs(self, c: Connection, trial: int) -> dict[int, str]:
        """The pairs of a trial by step; empty where they were not kept."""
        mine = (PAIRS.c.sweep == self.sweep) & (PAIRS.c.trial == trial)
        return {r.step: r.pairs for r in c.execute(select(PAIRS.c.step, PAIRS.c.pairs).where(mine))}

    def progress(self, c: Connection) -> dict[int, tuple[int, dict[str, float]]]:
        """Last step and last values of every trial."""
        rows = c.execute(select(PROGRESS).where(PROGRESS.c.sweep == self.sweep))
        return {r.trial: (r.step, decode(r.metrics)) for r in rows}

    def progress_of(self, c: Connection, trial: int) -> tuple[int, dict[str, float]]:
        """Last step and last values of one trial; zero and none before its first point."""
        return self._progress_row(c, trial) or (0, {})

    def _progress_row(self, c: Connection, trial: int) -> tuple[int, dict[str, float]] | None:
        row = c.execute(made.PROGRESS_OF, self._of(trial)).one_or_none()
        return None if row is None else (row.step, decode(row.metrics))

    # --- verdicts ------------------------------------------------------------------------------------------------

    def set_judged(self, c: Connection, trial: int, key: str, verdict: str) -> None:
        """A judge's verdict; an older one of the same key is replaced."""
        mine = (JUDGED.c.sweep == self.sweep) & (JUDGED.c.trial == trial) & (JUDGED.c.key == key)
        c.execute(delete(JUDGED).where(mine))
        c.execute(insert(JUDGED).values(sweep=self.sweep, trial=trial, key=key, at=time.time(), verdict=verdict))

    def judged(self, c: Connection) -> list[str]:
        """Every verdict, by trial and key."""
        query = select(JUDGED.c.verdict).where(JUDGED.c.sweep == self.sweep)
        return list(c.execute(query.order_by(JUDGED.c.trial, JUDGED.c.key)).scalars())

    # --- events and requests -------------------------------------------------------------------------------------

    def add_event(self, c: Connection, kind: str, text: str, trial: int | None) -> int:
        """Something happened; returns its place in the order."""
        return self._append(c, EVENT, kind, text, trial)

    def events(self, c: Connection, after: int) -> list[Event]:
        """What happened after that event."""
        query = select(EVENT).where(EVENT.c.sweep == self.sweep, EVENT.c.seq > after).order_by(EVENT.c.seq)
        return [Event(r.seq, r.at, r.trial, r.kind, r.text) for r in c.execute(query)]

    def last_event(self, c: Connection, kinds: Sequence[str]) -> Event | None:
        """The newest of these kinds that is about no trial."""
        mine = (EVENT.c.sweep == self.sweep) & EVENT.c.trial.is_(None) & EVENT.c.kind.in_(kinds)
        row = c.execute(select(EVENT).where(mine).order_by(EVENT.c.seq.desc()).limit(1)).one_or_none()
        return None if row is None else Event(row.seq, row.at, row.trial, row.kind, row.text)

    def add_request(self, c: Connection, kind: str, text: str, trial: int | None) -> int:
        """Somebody at another terminal wants something."""
        return self._append(c, REQUEST, kind, text, trial)

    def requests(self, c: Connection) -> list[Request]:
        """What was asked and not yet done."""
        rows = c.execute(made.REQUESTS, {"of_sweep": self.sweep})
        return [Request(r.seq, r.at, r.trial, r.kind, r.text) for r in rows]

    def done(self, c: Connection, seq: int) -> None:
        """That request is dealt with."""
        mine = (REQUEST.c.sweep == self.sweep) & (REQUEST.c.seq == seq)
        c.execute(update(REQUEST).where(mine).values(done_at=time.time()))

    def _append(self, c: Connection, table: Table, kind: str, text: str, trial: int | None) -> int:
        seq = int(c.execute(made.LAST_SEQ[table.name], {"of_sweep": self.sweep}).scalar_one()) + 1
        row = {"sweep": self.sweep, "seq": seq, "at": time.time(), "trial": trial, "kind": kind, "text": text}
        c.execute(made.ADD_ROW[table.name], row)
        return seq

    def _of(self, trial: int) -> dict[str, Any]:
        return {"of_sweep": self.sweep, "of_trial": trial}

    def _next(self, c: Connection, table: Table, column: str) -> int:
        query = select(func.coalesce(func.max(table.c[column]), 0)).where(table.c.sweep == self.sweep)
        return int(c.execute(query).scalar_one()) + 1


def encode(metrics: Mapping[str, Any]) -> str:
    """JSON that every reader accepts: NaN and the infinities as text."""
    numbers = {name: as_number(value) for name, value in metrics.items()}
    return json.dumps({n: v if math.isfinite(v) else str(v) for n, v in numbers.items()}, allow_nan=False)


def decode(text: str) -> dict[str, float]:
    """The metrics that `encode` wrote."""
    return {name: float(value) for name, value in json.loads(text).items()}
