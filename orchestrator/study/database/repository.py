"""`SweepRepository`: rows of this package's tables, read and written in a transaction that the caller opened."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Table, delete, func, insert, select, update

from orchestrator.study.database import tables
from orchestrator.study.database.tables import (
    ATTEMPT,
    BEAT,
    DRIVER,
    EVENT,
    JUDGEMENT,
    PAIRS,
    PROGRESS,
    REQUEST,
    SPEC,
    STEP_METRICS,
    SWEEP,
)
from orchestrator.study.pruning.divergence_guard import as_number
from orchestrator.study.running_trial import LoggedMetrics
from orchestrator.study.trial_records import Event, Request, SpecVersion
from trainer.results import StepMetrics


@dataclass(frozen=True, slots=True)
class SweepRow:
    """The sweep's own row: its unique id, Optuna's study id, the tables' version and the driver's fencing token."""

    id: str
    study_id: int
    schema: int
    driver: int


@dataclass(frozen=True, slots=True)
class AttemptRow:
    """One attempt at a trial: when it was issued, in seconds since 1970, its slot's GPUs and seconds of training."""

    attempt: int
    at: float
    gpus: float
    seconds: float


class SweepRepository:
    """One sweep's rows in the tables of `tables.py`."""

    def __init__(self, sweep: str) -> None:
        self.sweep = sweep

    # --- the sweep -----------------------------------------------------------------------------------------------

    def sweep_row(self, connection: Connection, *, lock: bool = False) -> SweepRow | None:
        """Return the sweep's row, None if there is none; `lock`: other writers wait (in SQLite they do already)."""
        row = connection.execute(
            tables.SWEEP_ROW_LOCKED if lock else tables.SWEEP_ROW, {"of_sweep": self.sweep}
        ).one_or_none()
        return None if row is None else SweepRow(row.id, row.study_id, row.schema, row.driver)

    def spec_versions(self, connection: Connection) -> list[SpecVersion]:
        """Return every spec the sweep ran with, oldest first."""
        query = select(SPEC).where(SPEC.c.sweep == self.sweep).order_by(SPEC.c.version)
        return [SpecVersion(row.version, row.at, row.hash, row.spec) for row in connection.execute(query)]

    def add_spec(self, connection: Connection, text: str, digest: str) -> None:
        """Add a version of the spec."""
        version = self._next(connection, SPEC, "version")
        connection.execute(
            insert(SPEC).values(sweep=self.sweep, version=version, at=time.time(), hash=digest, spec=text)
        )

    # --- drivers -------------------------------------------------------------------------------------------------

    def add_driver(self, connection: Connection, holder: str) -> int:
        """Add a driver and return its fencing token; from now on only its writes are accepted."""
        token = self._next(connection, DRIVER, "driver")
        connection.execute(
            insert(DRIVER).values(sweep=self.sweep, driver=token, holder=holder, at=time.time(), seconds=0.0)
        )
        connection.execute(insert(BEAT).values(sweep=self.sweep, driver=token, beats=0))
        connection.execute(update(SWEEP).where(SWEEP.c.sweep == self.sweep).values(driver=token))
        return token

    def holder(self, connection: Connection, token: int) -> str:
        """Return the name of the process with this fencing token."""
        query = select(DRIVER.c.holder).where(DRIVER.c.sweep == self.sweep, DRIVER.c.driver == token)
        return connection.execute(query).scalar_one()

    def release_driver(self, connection: Connection, token: int) -> None:
        """Release the lease of this driver; changes nothing if a newer one has it."""
        condition = (SWEEP.c.sweep == self.sweep) & (SWEEP.c.driver == token)
        connection.execute(update(SWEEP).where(condition).values(driver=0))

    def heartbeat_counters(self, connection: Connection, token: int) -> tuple[float, int]:
        """Return a driver's working time in seconds and its number of heartbeats; one of them grows while it is alive.

        An older version of this program writes no heartbeats.
        """
        condition = (DRIVER.c.sweep == self.sweep) & (DRIVER.c.driver == token)
        beats = select(BEAT.c.beats).where(BEAT.c.sweep == self.sweep, BEAT.c.driver == token)
        seconds = float(connection.execute(select(DRIVER.c.seconds).where(condition)).scalar_one())
        return seconds, int(connection.execute(beats).scalar_one_or_none() or 0)

    def add_heartbeat(self, connection: Connection, token: int) -> None:
        """Count a heartbeat of this driver."""
        condition = (BEAT.c.sweep == self.sweep) & (BEAT.c.driver == token)
        connection.execute(update(BEAT).where(condition).values(beats=BEAT.c.beats + 1))

    def set_driver_seconds(self, connection: Connection, token: int, seconds: float) -> None:
        """Set a driver's working time in seconds."""
        connection.execute(tables.SET_DRIVER_SECONDS, {"of_sweep": self.sweep, "of_driver": token, "worked": seconds})

    def total_driver_seconds(self, connection: Connection, excluding: int = 0) -> float:
        """Return the working time in seconds of all drivers except `excluding`."""
        condition = (DRIVER.c.sweep == self.sweep) & (DRIVER.c.driver != excluding)
        return float(
            connection.execute(select(func.coalesce(func.sum(DRIVER.c.seconds), 0.0)).where(condition)).scalar_one()
        )

    # --- attempts ------------------------------------------------------------------------------------------------

    def add_attempt(self, connection: Connection, trial: int, attempt: int, gpus: float) -> None:
        """Add an attempt at a trial; `gpus`: of its slot."""
        row = {"sweep": self.sweep, "trial": trial, "attempt": attempt, "at": time.time(), "gpus": gpus, "seconds": 0.0}
        connection.execute(tables.ADD_ATTEMPT, row)

    def set_attempt_seconds(self, connection: Connection, trial: int, attempt: int, seconds: float) -> None:
        """Set the training time of an attempt in seconds."""
        condition = {"of_sweep": self.sweep, "of_trial": trial, "of_attempt": attempt}
        connection.execute(tables.SET_ATTEMPT_SECONDS, condition | {"worked": seconds})

    def attempts(self, connection: Connection, trial: int) -> list[AttemptRow]:
        """Return the attempts at a trial, oldest first."""
        query = select(ATTEMPT).where(ATTEMPT.c.sweep == self.sweep, ATTEMPT.c.trial == trial)
        rows = connection.execute(query.order_by(ATTEMPT.c.attempt))
        return [AttemptRow(row.attempt, row.at, row.gpus, row.seconds) for row in rows]

    def trial_seconds(self, connection: Connection) -> dict[int, float]:
        """Return the training time in seconds of every trial, over all its attempts."""
        query = select(ATTEMPT.c.trial, func.sum(ATTEMPT.c.seconds)).where(ATTEMPT.c.sweep == self.sweep)
        return {trial: float(seconds) for trial, seconds in connection.execute(query.group_by(ATTEMPT.c.trial))}

    def seconds_of_trial(self, connection: Connection, trial: int) -> float:
        """Return the training time in seconds of one trial, over all its attempts."""
        return float(connection.execute(tables.SECONDS_OF_TRIAL, self._sweep_and_trial(trial)).scalar_one())

    def gpu_seconds(self, connection: Connection, excluding: Collection[tuple[int, int]] = ()) -> float:
        """Return the GPU-seconds of all attempts except `excluding` (trial, attempt): seconds times the slot's GPUs."""
        condition = ATTEMPT.c.sweep == self.sweep
        for trial, attempt in excluding:
            condition &= ~((ATTEMPT.c.trial == trial) & (ATTEMPT.c.attempt == attempt))
        query = select(func.coalesce(func.sum(ATTEMPT.c.seconds * ATTEMPT.c.gpus), 0.0)).where(condition)
        return float(connection.execute(query).scalar_one())

    # --- metrics -------------------------------------------------------------------------------------------------

    def logged_metrics(self, connection: Connection, trial: int) -> LoggedMetrics:
        """Return the stored metrics of a trial."""
        found = self._progress_row(connection, trial)
        if found is None:
            return LoggedMetrics()
        return LoggedMetrics(
            {row.step for row in connection.execute(tables.SELECT_STEP_METRICS, self._sweep_and_trial(trial))}, *found
        )

    def add_metrics(
        self, connection: Connection, trial: int, metrics: Sequence[StepMetrics], before: LoggedMetrics
    ) -> LoggedMetrics:
        """Add metrics of new steps, in any order, and update the last values; return the state after them."""
        rows = [
            {"sweep": self.sweep, "trial": trial, "step": step_metrics.step, "metrics": encode(step_metrics.metrics)}
            for step_metrics in metrics
        ]
        connection.execute(tables.ADD_STEP_METRICS, rows)
        first, late = not before.steps, any(step_metrics.step < before.step for step_metrics in metrics)
        ordered = (
            self.metric_history(connection, trial)
            if late
            else sorted(metrics, key=lambda step_metrics: step_metrics.step)
        )
        after = before.with_metrics(ordered)
        row = {"step": after.step, "metrics": encode(after.last)}
        if first:
            connection.execute(tables.ADD_PROGRESS, {"sweep": self.sweep, "trial": trial} | row)
        else:
            connection.execute(
                tables.SET_PROGRESS, self._sweep_and_trial(trial) | {"at": row["step"], "last": row["metrics"]}
            )
        return after

    def metric_history(self, connection: Connection, trial: int, after: int = -1) -> list[StepMetrics]:
        """Return the metrics of a trial after step `after`, by step."""
        found = connection.execute(tables.STEP_METRICS_AFTER, self._sweep_and_trial(trial) | {"after": after})
        return [StepMetrics(row.step, decode(row.metrics)) for row in found]

    def last_steps(self, connection: Connection) -> dict[int, int]:
        """Return the last step of every trial that has metrics."""
        query = select(PROGRESS.c.trial, PROGRESS.c.step).where(PROGRESS.c.sweep == self.sweep)
        return {row.trial: row.step for row in connection.execute(query)}

    def remove_metrics(self, connection: Connection, trial: int) -> None:
        """Remove the stored metrics of a trial that begins again after a failure."""
        for table in (STEP_METRICS, PAIRS, PROGRESS):
            connection.execute(delete(table).where((table.c.sweep == self.sweep) & (table.c.trial == trial)))

    def add_pair_margins(self, connection: Connection, trial: int, metrics: Sequence[StepMetrics]) -> None:
        """Store the margins of each held-out pair, where the metrics have them."""
        rows = [
            {"sweep": self.sweep, "trial": trial, "step": step_metrics.step, "pairs": step_metrics.pair_margins}
            for step_metrics in metrics
            if step_metrics.pair_margins
        ]
        if rows:
            connection.execute(tables.ADD_PAIRS, rows)

    def pair_margins(self, connection: Connection, trial: int) -> dict[int, str]:
        """Return the packed pair margins of a trial by step; empty if they were not stored."""
        condition = (PAIRS.c.sweep == self.sweep) & (PAIRS.c.trial == trial)
        return {row.step: row.pairs for row in connection.execute(select(PAIRS.c.step, PAIRS.c.pairs).where(condition))}

    def progress(self, connection: Connection) -> dict[int, tuple[int, dict[str, float]]]:
        """Return the last step and the last values of every trial."""
        rows = connection.execute(select(PROGRESS).where(PROGRESS.c.sweep == self.sweep))
        return {row.trial: (row.step, decode(row.metrics)) for row in rows}

    def progress_of(self, connection: Connection, trial: int) -> tuple[int, dict[str, float]]:
        """Return the last step and the last values of one trial; 0 and {} before its first report."""
        return self._progress_row(connection, trial) or (0, {})

    def _progress_row(self, connection: Connection, trial: int) -> tuple[int, dict[str, float]] | None:
        row = connection.execute(tables.PROGRESS_OF, self._sweep_and_trial(trial)).one_or_none()
        return None if row is None else (row.step, decode(row.metrics))

    # --- judgements ----------------------------------------------------------------------------------------------

    def save_judgement(self, connection: Connection, trial: int, key: str, judgement: str) -> None:
        """Store a judgement; an older one with the same key is replaced."""
        condition = (JUDGEMENT.c.sweep == self.sweep) & (JUDGEMENT.c.trial == trial) & (JUDGEMENT.c.key == key)
        connection.execute(delete(JUDGEMENT).where(condition))
        connection.execute(
            insert(JUDGEMENT).values(sweep=self.sweep, trial=trial, key=key, at=time.time(), verdict=judgement)
        )

    def judgements(self, connection: Connection) -> list[str]:
        """Return all judgements, by trial and key."""
        query = select(JUDGEMENT.c.verdict).where(JUDGEMENT.c.sweep == self.sweep)
        return list(connection.execute(query.order_by(JUDGEMENT.c.trial, JUDGEMENT.c.key)).scalars())

    # --- events and requests -------------------------------------------------------------------------------------

    def add_event(self, connection: Connection, kind: str, text: str, trial: int | None) -> int:
        """Add an event; return its sequence number."""
        return self._append(connection, EVENT, kind, text, trial)

    def events(self, connection: Connection, after: int) -> list[Event]:
        """Return the events after sequence number `after`."""
        query = select(EVENT).where(EVENT.c.sweep == self.sweep, EVENT.c.seq > after).order_by(EVENT.c.seq)
        return [Event(row.seq, row.at, row.trial, row.kind, row.text) for row in connection.execute(query)]

    def last_event(self, connection: Connection, kinds: Sequence[str]) -> Event | None:
        """Return the newest event of these kinds that concerns the whole sweep."""
        condition = (EVENT.c.sweep == self.sweep) & EVENT.c.trial.is_(None) & EVENT.c.kind.in_(kinds)
        row = connection.execute(select(EVENT).where(condition).order_by(EVENT.c.seq.desc()).limit(1)).one_or_none()
        return None if row is None else Event(row.seq, row.at, row.trial, row.kind, row.text)

    def add_request(self, connection: Connection, kind: str, text: str, trial: int | None) -> int:
        """Add a request to the driver; return its sequence number."""
        return self._append(connection, REQUEST, kind, text, trial)

    def requests(self, connection: Connection) -> list[Request]:
        """Return the pending requests, oldest first."""
        rows = connection.execute(tables.REQUESTS, {"of_sweep": self.sweep})
        return [Request(row.seq, row.at, row.trial, row.kind, row.text) for row in rows]

    def complete_request(self, connection: Connection, seq: int) -> None:
        """Mark a request as completed."""
        condition = (REQUEST.c.sweep == self.sweep) & (REQUEST.c.seq == seq)
        connection.execute(update(REQUEST).where(condition).values(done_at=time.time()))

    def _append(self, connection: Connection, table: Table, kind: str, text: str, trial: int | None) -> int:
        seq = int(connection.execute(tables.LAST_SEQ[table.name], {"of_sweep": self.sweep}).scalar_one()) + 1
        row = {"sweep": self.sweep, "seq": seq, "at": time.time(), "trial": trial, "kind": kind, "text": text}
        connection.execute(tables.ADD_ROW[table.name], row)
        return seq

    def _sweep_and_trial(self, trial: int) -> dict[str, Any]:
        return {"of_sweep": self.sweep, "of_trial": trial}

    def _next(self, connection: Connection, table: Table, column: str) -> int:
        query = select(func.coalesce(func.max(table.c[column]), 0)).where(table.c.sweep == self.sweep)
        return int(connection.execute(query).scalar_one()) + 1


def encode(metrics: Mapping[str, Any]) -> str:
    """Return metrics as standard JSON, with NaN and infinities as text."""
    numbers = {name: as_number(value) for name, value in metrics.items()}
    return json.dumps(
        {name: value if math.isfinite(value) else str(value) for name, value in numbers.items()}, allow_nan=False
    )


def decode(text: str) -> dict[str, float]:
    """Return the metrics that `encode` wrote."""
    return {name: float(value) for name, value in json.loads(text).items()}
