"""What ends a sweep from outside while it runs: requests from other terminals, and its budget of hours."""

from __future__ import annotations

import time

from orchestrator.engine.stopping import Stop, StopKind
from orchestrator.study.study import Study

_ASK_SECONDS = 1.0


class Wishes:
    """Asks the study now and then. `stop` stays once there is one; `trials` are to be ended, each with its reason."""

    def __init__(self, study: Study) -> None:
        self.stop: Stop | None = None
        self.trials: dict[int, str] = {}
        self._study, self._asked_at = study, 0.0

    def ask(self) -> Stop | None:
        """Look, at most once a second."""
        now = time.monotonic()
        if self.stop is not None or now - self._asked_at < _ASK_SECONDS:
            return self.stop
        self._asked_at = now
        for request in self._study.requests():
            if request.kind != "stop":
                continue
            why = request.text or "stopped by `orchestrate stop`"
            if request.trial is None:
                self.stop = Stop(StopKind.STOPPED, why)
            else:
                self.trials[request.trial] = why
            self._study.done(request.seq)
        hours = self._study.spec.budget.hours
        if self.stop is None and hours is not None and self._study.elapsed_hours() >= hours:
            more = f"`--set budget.hours={2 * hours:g}` gives it more"
            self.stop = Stop(StopKind.OUT_OF_TIME, f"the budget of {hours:g} hours is spent; {more}")
        return self.stop
