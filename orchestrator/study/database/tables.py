"""Tables beside Optuna's, in the same database and transactions, and prepared statements.

The statements of every report, start and end of a trial are built once, as building one takes longer than executing it.
"""

from __future__ import annotations

from sqlalchemy import (
    Boolean,
    Column,
    Float,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    bindparam,
    func,
    insert,
    select,
    update,
)

SCHEMA = 6
"""Version of these tables. A database of a later version is refused, one of an earlier version gets missing tables."""
OLDEST_SCHEMA = 5
"""Earlier versions had other fingerprints of trials, so that no trial would be recognized as a duplicate."""

METADATA = MetaData()


def _sweep() -> Column[str]:
    return Column("sweep", String(64), primary_key=True)


def _number(name: str) -> Column[int]:
    return Column(name, Integer, primary_key=True, autoincrement=False)


SWEEP = Table(
    "prefsweep_sweep",
    METADATA,
    _sweep(),
    Column("id", String(32), nullable=False),
    Column("schema", Integer, nullable=False),
    Column("study_id", Integer, nullable=False),
    Column("driver", Integer, nullable=False),  # the driver whose writes are accepted
    Column("created_at", Float, nullable=False),
)

SPEC = Table(
    "prefsweep_spec",
    METADATA,
    _sweep(),
    _number("version"),
    Column("at", Float, nullable=False),
    Column("hash", String(64), nullable=False),
    Column("spec", Text, nullable=False),
)

DRIVER = Table(
    "prefsweep_driver",
    METADATA,
    _sweep(),
    _number("driver"),
    Column("holder", Text, nullable=False),
    Column("at", Float, nullable=False),
    Column("seconds", Float, nullable=False),  # by the monotonic clock
)

BEAT = Table(
    "prefsweep_beat",
    METADATA,
    _sweep(),
    _number("driver"),
    Column("beats", Integer, nullable=False),  # number of heartbeats; working time does not grow in a pause
)

STEP_METRICS = Table(
    "prefsweep_point",
    METADATA,
    _sweep(),
    _number("trial"),
    _number("step"),
    Column("metrics", Text, nullable=False),
)

PAIRS = Table(
    "prefsweep_pairs",
    METADATA,
    _sweep(),
    _number("trial"),
    _number("step"),
    Column("pairs", Text, nullable=False),  # StepMetrics.pair_margins, for the pruner that compares pair by pair
)

PROGRESS = Table(
    "prefsweep_progress",
    METADATA,
    _sweep(),
    _number("trial"),
    Column("step", Integer, nullable=False),
    Column("metrics", Text, nullable=False),  # the last value of each metric
)

EVENT = Table(
    "prefsweep_event",
    METADATA,
    _sweep(),
    _number("seq"),
    Column("at", Float, nullable=False),
    Column("trial", Integer),
    Column("kind", String(64), nullable=False),
    Column("text", Text, nullable=False),
)

REQUEST = Table(
    "prefsweep_request",
    METADATA,
    _sweep(),
    _number("seq"),
    Column("at", Float, nullable=False),
    Column("trial", Integer),
    Column("kind", String(64), nullable=False),
    Column("text", Text, nullable=False),
    Column("done_at", Float),
)

JUDGEMENT = Table(
    "prefsweep_judged",
    METADATA,
    _sweep(),
    _number("trial"),
    Column("key", String(64), primary_key=True),  # judge and decoding
    Column("at", Float, nullable=False),
    Column("verdict", Text, nullable=False),  # JSON
)

ENQUEUED = Table(
    "prefsweep_given",
    METADATA,
    _sweep(),
    _number("seq"),
    Column("at", Float, nullable=False),
    Column("leaves", Text, nullable=False),
    Column("origin", Text, nullable=False),
    Column("by_hand", Boolean, nullable=False),
    Column("parent", Integer),
    Column("trial", Integer),  # set in the transaction that creates the trial
)

FORK = Table(
    "prefsweep_fork",
    METADATA,
    _sweep(),
    _number("seq"),  # of the enqueued trial
    Column("step", Integer, nullable=False),
    Column("place", String(64), nullable=False),
)

ATTEMPT = Table(
    "prefsweep_attempt",
    METADATA,
    _sweep(),
    _number("trial"),
    _number("attempt"),
    Column("at", Float, nullable=False),
    Column("gpus", Float, nullable=False),  # of its slot; 1 without GPUs, to count slots
    Column("seconds", Float, nullable=False),  # training time by the monotonic clock, written at every report
)


SWEEP_ROW = select(SWEEP.c.id, SWEEP.c.study_id, SWEEP.c.schema, SWEEP.c.driver).where(
    SWEEP.c.sweep == bindparam("of_sweep")
)
SWEEP_ROW_LOCKED = SWEEP_ROW.with_for_update()

SET_DRIVER_SECONDS = (
    update(DRIVER)
    .where(DRIVER.c.sweep == bindparam("of_sweep"), DRIVER.c.driver == bindparam("of_driver"))
    .values(seconds=bindparam("worked"))
)
_ATTEMPT = (
    ATTEMPT.c.sweep == bindparam("of_sweep"),
    ATTEMPT.c.trial == bindparam("of_trial"),
    ATTEMPT.c.attempt == bindparam("of_attempt"),
)
SET_ATTEMPT_SECONDS = update(ATTEMPT).where(*_ATTEMPT).values(seconds=bindparam("worked"))
SECONDS_OF_TRIAL = select(func.coalesce(func.sum(ATTEMPT.c.seconds), 0.0)).where(*_ATTEMPT[:2])
ADD_ATTEMPT = insert(ATTEMPT)

ADD_STEP_METRICS = insert(STEP_METRICS)
ADD_PAIRS = insert(PAIRS)
SELECT_STEP_METRICS = (
    select(STEP_METRICS.c.step, STEP_METRICS.c.metrics)
    .where(STEP_METRICS.c.sweep == bindparam("of_sweep"), STEP_METRICS.c.trial == bindparam("of_trial"))
    .order_by(STEP_METRICS.c.step)
)
STEP_METRICS_AFTER = SELECT_STEP_METRICS.where(STEP_METRICS.c.step > bindparam("after"))
_PROGRESS = (PROGRESS.c.sweep == bindparam("of_sweep"), PROGRESS.c.trial == bindparam("of_trial"))
PROGRESS_OF = select(PROGRESS.c.step, PROGRESS.c.metrics).where(*_PROGRESS)
ADD_PROGRESS = insert(PROGRESS)
SET_PROGRESS = update(PROGRESS).where(*_PROGRESS).values(step=bindparam("at"), metrics=bindparam("last"))

LAST_SEQ = {
    table.name: select(func.coalesce(func.max(table.c.seq), 0)).where(table.c.sweep == bindparam("of_sweep"))
    for table in (EVENT, REQUEST)
}
ADD_ROW = {table.name: insert(table) for table in (EVENT, REQUEST)}
REQUESTS = (
    select(REQUEST).where(REQUEST.c.sweep == bindparam("of_sweep"), REQUEST.c.done_at.is_(None)).order_by(REQUEST.c.seq)
)

WAITING_TRIALS = (
    select(ENQUEUED)
    .where(ENQUEUED.c.sweep == bindparam("of_sweep"), ENQUEUED.c.trial.is_(None))
    .order_by(ENQUEUED.c.seq)
)
