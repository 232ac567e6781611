"""A driver's signs of life, whatever the driver itself waits for: a pause, a long evaluation, a slow mirror."""

from __future__ import annotations

import threading
from collections.abc import Callable

from orchestrator.errors import StorageRefused, SweepHeld
from orchestrator.study import lease


class Heartbeat:
    """Calls `beat` every `lease.BEAT` seconds from a thread of its own until `end`, or until it raises SweepHeld."""

    def __init__(self, beat: Callable[[], None]) -> None:
        self._beat, self._over = beat, threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """No more beats once this returns."""
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(lease.BEAT):
            try:
                self._beat()
            except SweepHeld:
                return  # the driver's next write is refused and tells it
            except StorageRefused:
                continue  # likewise; a database that comes back in time has missed nothing
