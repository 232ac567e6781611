"""What ends or pauses a sweep from outside while it runs: requests from other terminals, and its budget."""

from __future__ import annotations

import time
from collections.abc import Sequence

from orchestrator.engine.stopping import Stop, StopKind
from orchestrator.spec.sweep import SweepSpec
from orchestrator.study.driver import PAUSE, STOP, UNPAUSE
from orchestrator.study.records import Request, TrialRecord
from orchestrator.study.spending import overspent, reached
from orchestrator.study.study import Study

_ASK_SECONDS = 1.0


class Wishes:
    """Asks the study now and then. `stop` stays once there is one; `trials` are requests about single trials.

    `looked` says whether the last call asked, and so saw what other terminals had done.
    """

    def __init__(self, study: Study) -> None:
        self.stop: Stop | None = None
        self.trials: Sequence[Request] = ()
        self.looked = False
        self._study, self._asked_at = study, 0.0
        self._target: str = _reached(study.spec, study.best()) if study.spec.budget.target is not None else ""

    def ask(self) -> Stop | None:
        """Look, at most once a second."""
        now = time.monotonic()
        self.looked = self.stop is None and now - self._asked_at >= _ASK_SECONDS
        if not self.looked:
            return self.stop
        self._asked_at = now
        self._study.beat()
        asked = self._study.requests()
        self.trials = [request for request in asked if request.trial is not None]
        for request in asked:
            if request.trial is None:
                self._take(request)
        self.stop = self.stop or self.over()
        return self.stop

    def _take(self, request: Request) -> None:
        if request.kind == STOP:
            self.stop = Stop(StopKind.STOPPED, request.text or "stopped by `orchestrate stop`")
        elif request.kind == PAUSE and self.stop is None:
            self.stop = Stop(StopKind.PAUSED, request.text)
        elif request.kind == UNPAUSE and self.stop is not None and self.stop.kind is StopKind.PAUSED:
            self.stop = None
        self._study.done(request.seq)

    def closed(self, record: TrialRecord) -> None:
        """A trial ended: it may be what the sweep was looking for."""
        self._target = self._target or _reached(self._study.spec, record)

    def over(self) -> Stop | None:
        """Time or target ends the sweep, with what gives it more."""
        budget = self._study.spec.budget
        if self._target:
            more = "`--set budget.target=VALUE` asks for more, null for no target"
            return Stop(StopKind.TARGET, f"{self._target}; {more}")
        if not budget.timed or not (over := overspent(budget, self._study.spent())):
            return None
        leaf, limit = ("gpu_hours", budget.gpu_hours) if "gpu_hours" in over else ("hours", budget.hours)
        return Stop(StopKind.OUT_OF_BUDGET, f"{over}; `--set budget.{leaf}={2 * (limit or 0.0):g}` gives it more")


def _reached(spec: SweepSpec, record: TrialRecord | None) -> str:
    if record is None or not reached(spec.budget, spec.goal, record.value):
        return ""
    return f"trial {record.number} has {spec.goal.metric} {record.value:g}, and the target is {spec.budget.target:g}"
