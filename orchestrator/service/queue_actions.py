"""What people did with sweeps in the queue: a table beside it, written in the transaction that changes the sweep.

Changes of a sweep that has begun are in its study, as `orchestrate history` shows them.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from sqlalchemy import Column, Connection, Float, Integer, MetaData, String, Table, Text, insert, select

from orchestrator.commands.request_commands import acting_person

ACTIONS = Table(
    "service_actions",
    MetaData(),
    Column("seq", Integer, primary_key=True, autoincrement=True),
    Column("sweep", String(64), nullable=False, index=True),
    Column("at", Float, nullable=False),
    Column("person", String(64), nullable=False),
    Column("action", Text, nullable=False),
)


@dataclass(frozen=True, slots=True)
class QueueAction:
    """One action of a person."""

    at: float
    """Seconds since 1970."""
    person: str
    """"" for a program of this machine that changes the queue without the service's API."""
    action: str


def record_action(connection: Connection, name: str, action: str, person: str | None = None) -> None:
    """Add an action to the history of a sweep, by default of the person whose request is answered."""
    row = {"sweep": name, "at": time.time(), "person": acting_person() if person is None else person, "action": action}
    connection.execute(insert(ACTIONS).values(**row))


def actions_of(connection: Connection, name: str) -> list[QueueAction]:
    """Return what people did with a sweep in the queue, oldest first."""
    columns = (ACTIONS.c.at, ACTIONS.c.person, ACTIONS.c.action)
    rows = connection.execute(select(*columns).where(ACTIONS.c.sweep == name).order_by(ACTIONS.c.seq))
    return [QueueAction(*row) for row in rows]
