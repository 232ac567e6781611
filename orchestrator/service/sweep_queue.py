"""`SweepQueue`: the sweeps that the service starts, in a database of the runs folder.

It stores only what no study can know: who waits, in which order, and how often a driver was started. Whether a sweep
runs, and how far it is, is read from its study and its lock.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from sqlalchemy import (
    Connection,
    Row,
    RowMapping,
    func,
    insert,
    select,
    update,
)

from orchestrator.commands.runs_folder.queue_records import BY_SERVICE, QueueAction, actions_of
from orchestrator.errors import (
    ExitCode,
    NameTaken,
    OrchestrateError,
    closest_match,
)
from orchestrator.service.queue_tables import ACTIONS, QueueDatabase, record_action
from orchestrator.service.queue_tables import REQUESTS as _REQUESTS
from orchestrator.service.queue_tables import SWEEPS as _SWEEPS
from trainer.storage.failpoints import failpoint

MOST_DEATHS = 3
"""So many drivers of a sweep that die are followed by another."""
_KEY_SECONDS = 30 * 24 * 3600.0
"""How long an idempotency key is remembered."""


_ORDER = (_SWEEPS.c.again.desc(), _SWEEPS.c.priority.desc(), _SWEEPS.c.seq)
"""In which sweeps start."""
_LAST_CHANGE = select(
    select(func.count()).select_from(_SWEEPS).scalar_subquery(),
    select(ACTIONS.c.seq).order_by(ACTIONS.c.seq.desc()).limit(1).scalar_subquery(),
    select(ACTIONS.c.at).order_by(ACTIONS.c.seq.desc()).limit(1).scalar_subquery(),
)
"""Changes with every change of a sweep: each adds an action, and `forget`, which removes some, removes a sweep too."""


class QueueState(StrEnum):
    """What the service does with a sweep; the study has the sweep's own state."""

    WAITING = "waiting"
    """It is started when its turn comes and its GPUs are free."""
    DRIVEN = "driven"
    """A driver was started, or is just being started."""
    FINISHED = "finished"
    STOPPED = "stopped"
    """A person stopped it, or its drivers died too often; it can be resumed."""
    FAILED = "failed"
    """Its driver refused it, as for data that cannot be read."""
    WITHDRAWN = "withdrawn"
    """Taken out of the queue before it began."""

    @property
    def has_ended(self) -> bool:
        """Whether the service starts nothing for it."""
        return self not in (QueueState.WAITING, QueueState.DRIVEN)


@dataclass(frozen=True, slots=True)
class QueuedSweep:
    """One row of the queue; times in seconds since 1970."""

    seq: int
    name: str
    owner: str
    priority: int
    """Larger ones start first."""
    state: QueueState
    spec: str
    """The resolved sweep file; "" for a sweep that a command began."""
    gpus: int
    """GPUs that one trial needs."""
    launch: int
    """Number of its newest driver; 0 before the first."""
    boot: str
    """Boot id of the machine when that driver was started."""
    again: bool
    """Whether it waits because its driver died: it is resumed before any other sweep starts."""
    deaths: int
    """Drivers that died since a person submitted or resumed it."""
    why: str
    """Why it ended, or why it was started again."""
    submitted_at: float
    started_at: float | None
    ended_at: float | None

    @property
    def has_fault(self) -> bool:
        """Whether `why` says what went wrong; a person's stop, a withdrawal and the end of a budget are no faults."""
        if self.state is QueueState.STOPPED:
            return self.deaths > MOST_DEATHS
        return self.state is QueueState.FAILED or (not self.state.has_ended and self.deaths > 0)


class QueueRefused(OrchestrateError):
    """The queue cannot do this with the sweep in its present state; nothing was changed."""

    code = ExitCode.USER


class NotQueued(OrchestrateError):
    """The queue has no sweep of this name."""

    def __init__(self, name: str, names: Sequence[str]) -> None:
        nearest = closest_match(name, names)
        super().__init__(f"the queue has no sweep named {name!r}{f'; did you mean {nearest!r}?' if nearest else ''}")


class NotBegun(QueueRefused):
    """The sweep has no folder yet: it waits, is just starting, or ended before its first trial."""

    def __init__(self, sweep: QueuedSweep) -> None:
        match sweep.state:
            case QueueState.WAITING:
                text = "waits in the queue"
            case QueueState.DRIVEN:
                text = "is just starting"
            case _:
                text = f"is {sweep.state} and has not begun{': ' if sweep.why else ''}{sweep.why}"
        super().__init__(f"{sweep.name} {text}; it has no trials yet")


class AlreadyQueued(QueueRefused):
    """The sweep waits, or is driven."""

    def __init__(self, sweep: QueuedSweep) -> None:
        is_waiting = sweep.state is QueueState.WAITING
        super().__init__(f"{sweep.name} is waiting already" if is_waiting else f"{sweep.name} has a driver already")


class KeyUsed(OrchestrateError):
    """The idempotency key belongs to another request of this person."""

    def __init__(self, key: str) -> None:
        super().__init__(f"the idempotency key {key!r} was used for another request; give each request its own key")


class NotAnswered(QueueRefused):
    """A request with this idempotency key has begun, and its answer is not stored."""

    def __init__(self, key: str, name: str) -> None:
        super().__init__(
            f"a request with the idempotency key {key!r} has begun, and is not answered: it is at work, or the service "
            f"ended before its answer; the history of {name} says whether it had an effect"
        )


class SweepQueue:
    """The queue in its database, for one service and any number of readers. Each method is one transaction."""

    def __init__(self, database: QueueDatabase | str) -> None:
        """`database`: open, or the SQLAlchemy URL of one, which is opened. Raises as `QueueDatabase`."""
        self._database = QueueDatabase(database) if isinstance(database, str) else database
        self._overview: tuple[Any, dict[str, QueuedSweep]] | None = None

    def close(self) -> None:
        """Close the connections."""
        self._database.close()

    def submit(
        self,
        name: str,
        spec: str,
        folder: Path,
        *,
        owner: str,
        priority: int = 0,
        gpus: int = 0,
        key: str = "",
        digest: str = "",
    ) -> tuple[QueuedSweep, bool]:
        """Add a sweep; with a `key` that was used for the same request, return that sweep again.

        Args:
            name: the sweep.
            spec: the resolved sweep file.
            folder: the folder that the sweep will have.
            owner: who submitted it.
            priority: larger ones start first; equal ones in the order of submission.
            gpus: GPUs that one trial needs.
            key: idempotency key; "" for none.
            digest: of the request, to tell whether a repeated key has the same one.

        Returns:
            The sweep, and whether it is new.

        Raises:
            KeyUsed: the key belongs to another request.
            NameTaken: a sweep of this name exists.
        """
        now = time.time()
        with self._database.change() as connection:
            if key and (used := _request(connection, owner, key)) is not None:
                if used.digest != digest:
                    raise KeyUsed(key)
                return _find(connection, used.sweep), False
            old = connection.execute(select(_SWEEPS).where(_SWEEPS.c.name == name)).first()
            if folder.exists() or (old is not None and not QueueState(old.state).has_ended):
                raise NameTaken(name, folder)
            if old is not None:  # it ended without a folder, so that its name is free
                connection.execute(_SWEEPS.delete().where(_SWEEPS.c.name == name))
            row = {"name": name, "owner": owner, "priority": priority, "spec": spec, "gpus": gpus}
            _add(connection, row, now)
            record_action(connection, name, f"submitted with priority {priority}", owner)
            if key:
                request = {"person": owner, "key": key, "digest": digest, "sweep": name, "at": now}
                connection.execute(insert(_REQUESTS).values(**request))
            failpoint("queue.submit")
            return _find(connection, name), True

    def begin_request(self, person: str, key: str, digest: str, name: str) -> str | None:
        """Take an idempotency key for a request about a sweep.

        Returns:
            The answer of the same request before, as `store_answer` was given it; None where it is new.

        Raises:
            KeyUsed: the key belongs to another request.
            NotAnswered: the same request has begun and was not answered.
        """
        now = time.time()
        with self._database.change() as connection:
            connection.execute(_REQUESTS.delete().where(_REQUESTS.c.at < now - _KEY_SECONDS))
            if (used := _request(connection, person, key)) is None:
                request = {"person": person, "key": key, "digest": digest, "sweep": name, "at": now}
                connection.execute(insert(_REQUESTS).values(**request))
                return None
        if used.digest != digest:
            raise KeyUsed(key)
        if used.answer is None:
            raise NotAnswered(key, name)
        return used.answer

    def store_answer(self, person: str, key: str, answer: str | None) -> None:
        """Store the answer of a request that `begin_request` began; None: it failed, and its key is free again."""
        mine = (_REQUESTS.c.person == person) & (_REQUESTS.c.key == key)
        with self._database.change() as connection:
            connection.execute(
                _REQUESTS.delete().where(mine)
                if answer is None
                else update(_REQUESTS).where(mine).values(answer=answer)
            )

    def adopt(self, name: str, *, owner: str, gpus: int, how: str = "") -> QueuedSweep:
        """Let a sweep that a command began wait, to be resumed: its spec is the study's. Raises QueueRefused.

        `how`: as of `resume`.
        """
        row = {"name": name, "owner": owner, "priority": 0, "spec": "", "gpus": gpus}
        with self._database.change() as connection:
            if connection.execute(select(_SWEEPS).where(_SWEEPS.c.name == name)).first() is not None:
                raise QueueRefused(f"{name} is in the queue already")
            _add(connection, row, time.time())
            record_action(connection, name, f"resumed{how}, as a command had begun it", owner)
            return _find(connection, name)

    def forget(self, name: str) -> None:
        """Remove a sweep that has ended and whose folder is gone, if the queue has it. Raises QueueRefused."""
        with self._database.change() as connection:
            row = connection.execute(select(_SWEEPS.c.state).where(_SWEEPS.c.name == name)).first()
            if row is not None and not QueueState(row.state).has_ended:
                raise QueueRefused(f"{name} is {row.state}")
            connection.execute(_SWEEPS.delete().where(_SWEEPS.c.name == name))
            connection.execute(ACTIONS.delete().where(ACTIONS.c.sweep == name))

    def sweeps(self, states: Sequence[QueueState] = tuple(QueueState)) -> list[QueuedSweep]:
        """Return the sweeps in these states, in the order in which they start."""
        wanted = [state.value for state in states]
        with self._database.snapshot() as connection:
            rows = connection.execute(select(_SWEEPS).where(_SWEEPS.c.state.in_(wanted)).order_by(*_ORDER))
            return [_parsed(row) for row in rows.mappings()]

    def overview(self) -> Mapping[str, QueuedSweep]:
        """Return all sweeps by name without their files: `spec` is "". They are read again only after a change."""
        with self._database.snapshot() as connection:
            change = tuple(connection.execute(_LAST_CHANGE).one())
            if self._overview is None or self._overview[0] != change:
                rows = connection.execute(select(*(column for column in _SWEEPS.c if column.name != "spec")))
                found = {row["name"]: _parsed(row, spec="") for row in rows.mappings()}
                self._overview = (change, found)
            return self._overview[1]

    def find(self, name: str) -> QueuedSweep:
        """Return the sweep of this name. Raises NotQueued."""
        with self._database.snapshot() as connection:
            return _find(connection, name)

    def actions(self, name: str) -> list[QueueAction]:
        """Return what people and the service did with the sweep in the queue, oldest first."""
        with self._database.snapshot() as connection:
            return actions_of(connection, name)

    def set_priority(self, name: str, priority: int) -> QueuedSweep:
        """Change the priority of a waiting sweep. Raises NotQueued, QueueRefused."""
        return self._change(name, "its priority decides only when it starts", [QueueState.WAITING], priority=priority)

    def withdraw(self, name: str, why: str) -> QueuedSweep:
        """Take a waiting sweep out of the queue. Raises NotQueued, QueueRefused."""
        return self._change(
            name, "only waiting sweeps are withdrawn", [QueueState.WAITING], **_ended(QueueState.WITHDRAWN, why)
        )

    def resume(self, name: str, *, how: str = "", spec: str = "", gpus: int | None = None) -> QueuedSweep:
        """Let a sweep that has ended wait again, at the end of its priority.

        `how`: with which changes, for the history; `spec` and `gpus` replace those of a sweep that was changed.

        Raises:
            NotQueued, QueueRefused: nothing was changed.
        """
        with self._database.change() as connection:
            found = _find(connection, name)
            if not found.state.has_ended:
                raise AlreadyQueued(found)
            values: dict[str, Any] = {"state": QueueState.WAITING.value, "again": False, "deaths": 0, "why": ""}
            values |= {"ended_at": None, "seq": _next_seq(connection)}
            values |= ({"spec": spec} if spec else {}) | ({} if gpus is None else {"gpus": gpus})
            connection.execute(update(_SWEEPS).where(_SWEEPS.c.name == name).values(**values))
            record_action(connection, name, f"resumed{how}")
            return _find(connection, name)

    def begin_launch(self, name: str, boot: str) -> QueuedSweep:
        """Record that a driver is about to be started, before it is; return the sweep with the driver's number."""
        with self._database.change() as connection:
            found = _find(connection, name)
            if found.state is not QueueState.WAITING:
                raise QueueRefused(f"{name} is {found.state}: only waiting sweeps are started")
            values: dict[str, Any] = {"state": QueueState.DRIVEN.value, "launch": found.launch + 1, "boot": boot}
            values["again"] = False
            values["started_at"] = time.time() if found.started_at is None else found.started_at
            connection.execute(update(_SWEEPS).where(_SWEEPS.c.name == name).values(**values))
            record_action(
                connection, name, f"started driver {found.launch + 1}" if found.launch else "started", BY_SERVICE
            )
            return _find(connection, name)

    def record_adoption(self, name: str) -> None:
        """Record that a service which was started again found the sweep's driver alive."""
        with self._database.change() as connection:
            record_action(connection, name, "found its driver running, and adopted it", BY_SERVICE)

    def record_stop(self, name: str, why: str) -> None:
        """Record that a person ended a process of the sweep that reads no requests."""
        with self._database.change() as connection:
            record_action(connection, name, why)

    def record_death(self, name: str, launch: int, why: str, most: int | None) -> QueuedSweep:
        """Let a sweep whose driver died wait for its resumption, before any other.

        Args:
            name: the sweep.
            launch: number of that driver; the sweep is unchanged where a later one was started.
            why: how it died.
            most: so many deaths are resumed, after more the sweep is STOPPED; None: this death is not counted, as that
                of a machine that was started again.
        """
        with self._database.change() as connection:
            found = _find(connection, name)
            if found.state is not QueueState.DRIVEN or found.launch != launch:
                return found
            deaths = found.deaths + (most is not None)
            values: dict[str, Any] = {"state": QueueState.WAITING.value, "again": True, "deaths": deaths, "why": why}
            if most is not None and deaths > most:
                drivers = f"{deaths} drivers ended unexpectedly, the last: " if deaths > 1 else ""
                values |= _ended(QueueState.STOPPED, f"{drivers}{why}")
            connection.execute(update(_SWEEPS).where(_SWEEPS.c.name == name).values(**values))
            ends = values["state"] == QueueState.STOPPED.value
            record_action(connection, name, f"{'stopped' if ends else 'resumed'}: {values['why']}", BY_SERVICE)
            return _find(connection, name)

    def end(self, name: str, state: QueueState, why: str) -> QueuedSweep:
        """Record how a driven sweep ended."""
        return self._change(name, "it is not driven", [QueueState.DRIVEN], **_ended(state, why))

    def _change(self, name: str, reason: str, states: Sequence[QueueState], **values: Any) -> QueuedSweep:
        with self._database.change() as connection:
            found = _find(connection, name)
            if found.state not in states:
                raise QueueRefused(f"{name} is {found.state}: {reason}")
            connection.execute(update(_SWEEPS).where(_SWEEPS.c.name == name).values(**values))
            if "priority" in values:
                record_action(connection, name, f"priority {values['priority']}")
            elif values.get("state") == QueueState.WITHDRAWN.value:
                record_action(connection, name, f"withdrawn: {values['why']}")
            elif found.state is QueueState.DRIVEN:
                record_action(connection, name, ": ".join(filter(None, [values["state"], values["why"]])), BY_SERVICE)
            return _find(connection, name)


def _request(connection: Connection, person: str, key: str) -> Row[Any] | None:
    return connection.execute(select(_REQUESTS).where(_REQUESTS.c.person == person, _REQUESTS.c.key == key)).first()


def _find(connection: Connection, name: str) -> QueuedSweep:
    row = connection.execute(select(_SWEEPS).where(_SWEEPS.c.name == name)).mappings().first()
    if row is None:
        raise NotQueued(name, list(connection.execute(select(_SWEEPS.c.name)).scalars()))
    return _parsed(row)


def _next_seq(connection: Connection) -> int:
    """Return the place behind all others; the databases' own counters know nothing of places that were given anew."""
    return connection.execute(select(func.coalesce(func.max(_SWEEPS.c.seq), 0))).scalar_one() + 1


def _add(connection: Connection, row: dict[str, Any], now: float) -> None:
    values = row | {"seq": _next_seq(connection), "state": QueueState.WAITING.value, "submitted_at": now}
    connection.execute(insert(_SWEEPS).values(**values))


def _parsed(row: RowMapping, **more: Any) -> QueuedSweep:
    values: dict[str, Any] = {str(column): value for column, value in row.items()} | more
    values["state"] = QueueState(values["state"])
    return QueuedSweep(**values)


def _ended(state: QueueState, why: str) -> dict[str, Any]:
    return {"state": state.value, "why": why, "ended_at": time.time()}
