"""The statements of every report, start and end, put together once: making one takes longer than running it."""

from __future__ import annotations

from sqlalchemy import bindparam, func, insert, select, update

from orchestrator.study.tables import ATTEMPT, DRIVER, EVENT, GIVEN, PAIRS, POINT, PROGRESS, REQUEST, SWEEP

IDENTITY = select(SWEEP.c.id, SWEEP.c.study_id, SWEEP.c.schema, SWEEP.c.driver).where(
    SWEEP.c.sweep == bindparam("of_sweep")
)
IDENTITY_LOCKED = IDENTITY.with_for_update()

DRIVER_WORKED = (
    update(DRIVER)
    .where(DRIVER.c.sweep == bindparam("of_sweep"), DRIVER.c.driver == bindparam("of_driver"))
    .values(seconds=bindparam("worked"))
)
_ATTEMPT = (
    ATTEMPT.c.sweep == bindparam("of_sweep"),
    ATTEMPT.c.trial == bindparam("of_trial"),
    ATTEMPT.c.attempt == bindparam("of_attempt"),
)
ATTEMPT_WORKED = update(ATTEMPT).where(*_ATTEMPT).values(seconds=bindparam("worked"))
SECONDS_OF_TRIAL = select(func.coalesce(func.sum(ATTEMPT.c.seconds), 0.0)).where(*_ATTEMPT[:2])
ADD_ATTEMPT = insert(ATTEMPT)

ADD_POINTS = insert(POINT)
ADD_PAIRS = insert(PAIRS)
POINTS = (
    select(POINT.c.step, POINT.c.metrics)
    .where(POINT.c.sweep == bindparam("of_sweep"), POINT.c.trial == bindparam("of_trial"))
    .order_by(POINT.c.step)
)
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

GIVEN_WAITING = (
    select(GIVEN).where(GIVEN.c.sweep == bindparam("of_sweep"), GIVEN.c.trial.is_(None)).order_by(GIVEN.c.seq)
)
