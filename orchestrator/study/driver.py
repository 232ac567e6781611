"""The driver's hold on a study: a token that fences off older drivers, and working time by the monotonic clock."""

from __future__ import annotations

import os
import socket
import time

from sqlalchemy import Connection

from orchestrator.errors import SweepHeld
from orchestrator.study.ledger import Ledger

STOP = "stop"
"""The request that ends a sweep. It is meant for the driver of that moment, not for the one that resumes later."""


class Driver:
    """One process that drives a sweep. A newer one fences it off: its writes are refused from then on."""

    def __init__(self, ledger: Ledger, token: int) -> None:
        self._ledger, self._token = ledger, token
        self._began = time.monotonic()

    @classmethod
    def begin(cls, ledger: Ledger, c: Connection) -> Driver:
        """Take over. Requests to stop that nobody answered have lapsed."""
        ledger.identity(c, lock=True)
        who = f"pid {os.getpid()} on {socket.gethostname()}"
        driver = cls(ledger, ledger.new_driver(c, who))
        ledger.add_event(c, "driver", f"{who} drives", None)
        for request in ledger.requests(c):
            if request.kind == STOP:
                ledger.done(c, request.seq)
                ledger.add_event(c, "lapsed", f"a request to stop lapsed: {request.text}", request.trial)
        return driver

    @property
    def seconds(self) -> float:
        """How long this driver has been at it."""
        return time.monotonic() - self._began

    def still_mine(self, c: Connection) -> None:
        """Refuse the write if a newer driver took over; else note the time worked."""
        identity = self._ledger.identity(c, lock=True)
        if identity is None or identity.driver != self._token:
            holder = "nobody: it is gone" if identity is None else self._ledger.holder(c, identity.driver)
            raise SweepHeld(self._ledger.sweep, holder)
        self._ledger.worked(c, self._token, self.seconds)

    def seconds_of_all(self, c: Connection) -> float:
        """The working time of all drivers of this sweep, this one up to now."""
        return self._ledger.seconds(c, but=self._token) + self.seconds
