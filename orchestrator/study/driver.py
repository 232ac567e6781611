"""The driver's hold on a study: a token that fences off older drivers, and working time by the monotonic clock."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager

from sqlalchemy import Connection

from orchestrator.errors import SweepHeld
from orchestrator.study import lease
from orchestrator.study.ledger import Ledger
from orchestrator.study.records import DRIVER

STOP, PAUSE, UNPAUSE, PRUNE = "stop", "pause", "unpause", "prune"
"""What any terminal may ask of the driver, for the whole sweep or for one trial."""
OF_THE_MOMENT = (STOP, PAUSE, UNPAUSE)
"""For the whole sweep these are meant for the driver of that moment, not for the one that resumes later."""


class Driver:
    """One process that drives a sweep. A newer one fences it off: its writes are refused from then on."""

    def __init__(self, ledger: Ledger, token: int) -> None:
        self._ledger, self._token = ledger, token
        self._began, self._spoke = time.monotonic(), lease.clock()
        self._rests_since: float | None = None
        self.fenced = False
        """Whether a write was refused because a newer driver took over."""

    @classmethod
    def begin(cls, ledger: Ledger, c: Connection) -> Driver:
        """Take over. Requests to stop that nobody answered have lapsed."""
        ledger.identity(c, lock=True)
        who = lease.signature()
        driver = cls(ledger, ledger.new_driver(c, who))
        ledger.add_event(c, DRIVER, f"{lease.shown(who)} drives", None)
        for request in ledger.requests(c):
            if request.trial is None and request.kind in OF_THE_MOMENT:
                ledger.done(c, request.seq)
                ledger.add_event(c, "lapsed", f"a request to {request.kind} lapsed: {request.text}", None)
        return driver

    @staticmethod
    def await_turn(ledger: Ledger, reading: Callable[[], AbstractContextManager[Connection]]) -> None:
        """Return once no driver lives; SweepHeld, naming it, when one does.

        One of this machine holds the sweep while its process lives. One elsewhere is watched: it has lost the sweep
        when it shows no sign of life for `lease.PATIENCE` seconds.
        """
        with reading() as c:
            identity = ledger.identity(c)
            holder = ledger.holder(c, identity.driver) if identity is not None and identity.driver else ""
        if identity is None or not holder or lease.is_gone(holder):
            return
        if lease.lives_here(holder):
            raise SweepHeld(ledger.sweep, lease.shown(holder), stopped=lease.is_stopped(holder))

        def signs() -> tuple[float, int] | None:
            with reading() as c:
                now = ledger.identity(c)
                return ledger.signs_of_life(c, identity.driver) if now is not None and now.driver else None

        if not lease.goes_silent(signs, lease.PATIENCE):
            raise SweepHeld(ledger.sweep, lease.shown(holder))

    def leave(self, c: Connection) -> None:
        """The next driver need not wait. A driver that was fenced off has nothing to give back."""
        self._ledger.nobody_drives(c, self._token)

    @property
    def seconds(self) -> float:
        """How long this driver has been at it, rests left out."""
        return (self._rests_since or time.monotonic()) - self._began

    def rest(self) -> None:
        """The sweep is paused: from here on no working time counts."""
        self._rests_since = self._rests_since or time.monotonic()

    def wake(self) -> None:
        """It goes on."""
        if self._rests_since is not None:
            self._began += time.monotonic() - self._rests_since
            self._rests_since = None

    @property
    def silent(self) -> float:
        """Seconds since a write of this driver was last accepted, the machine's sleep included."""
        return lease.clock() - self._spoke

    def beat(self, c: Connection) -> None:
        """A sign of life. Raises SweepHeld as `still_mine` does."""
        self.still_mine(c)
        self._ledger.beat(c, self._token)

    def still_mine(self, c: Connection) -> None:
        """Refuse the write if a newer driver took over; else note the time worked."""
        identity = self._ledger.identity(c, lock=True)
        if self.fenced or identity is None or identity.driver != self._token:
            self.fenced = True
            raise SweepHeld(self._ledger.sweep, self._holder(c, 0 if identity is None else identity.driver))
        self._ledger.worked(c, self._token, self.seconds)
        self._spoke = lease.clock()

    def _holder(self, c: Connection, token: int) -> str:
        return lease.shown(self._ledger.holder(c, token)) if token else "nobody any more"

    def seconds_of_all(self, c: Connection) -> float:
        """The working time of all drivers of this sweep, this one up to now."""
        return self._ledger.seconds(c, but=self._token) + self.seconds
