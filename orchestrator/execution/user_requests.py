"""Requests about single trials. Each stays in the study until it has had its effect: no kill of a driver loses it.

What ends or pauses a sweep from outside while it runs: requests from other terminals, and its budget.

What is paused: a sweep as a whole, whose driver stays and waits; or single trials, which may be all that is left.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from orchestrator.execution.messages import Job
from orchestrator.execution.stop_reasons import Interrupt, Stop, StopKind
from orchestrator.interfaces import Sink, View
from orchestrator.spec.sweep_spec import SweepSpec
from orchestrator.study.database.driver_lease import PAUSE, PRUNE, STOP, UNPAUSE
from orchestrator.study.study import Study
from orchestrator.study.sweep_terms import overspent, reached
from orchestrator.study.trial_records import Outcome, Request, TrialRecord, TrialState

PAUSED_STATUS = "KILLED"
"""MLflow has no word for it; the tag `state` says PAUSED."""


class Hands:
    """What people asked for and is not done yet. A trial in a worker's hands ends or pauses at its next report."""

    def __init__(self, study: Study, sink: Sink, view: View, on_closed: Callable[[TrialRecord], None]) -> None:
        self._study, self._sink, self._view, self._on_closed = study, sink, view, on_closed
        self._ending: dict[int, Request] = {}
        self._pausing: dict[int, Request] = {}

    def apply(self, requests: Sequence[Request], live: Mapping[int, Job]) -> None:
        """Do what can be done now; `live` are the trials that workers have."""
        for request in requests:
            number = request.trial
            assert number is not None
            if number in live:
                self._ask(number, request, live[number])
            else:
                self._do(number, request)

    def _ask(self, number: int, request: Request, job: Job) -> None:
        """A worker has it: remember, and answer when its report comes."""
        match request.kind:
            case "prune" | "stop":
                self._ending[number] = request
            case "pause":
                self._pausing[number] = request
                if not job.stop_asked:
                    self._view.say(f"trial {number} is asked to checkpoint and pause: {request.text}")
                    job.ask_to_stop()
            case _ if number not in self._pausing:
                self._answer(request, f"trial {number} was not paused")
            case _:
                pass  # once it is paused

    def _do(self, number: int, request: Request) -> None:
        record = self._study.trial(number)
        if record is None or record.state.finished:
            state = "not there" if record is None else f"{record.state} already"
            self._answer(request, f"too late to {request.kind}: trial {number} is {state}")
        elif request.kind in (PRUNE, STOP):
            outcome = by_hand(request)
            tags = {"state": outcome.state.value, "reason": outcome.reason}
            self._sink.end(str(number), status=PAUSED_STATUS, tags=tags, at=time.time())
            ended = self._study.dismiss(number, outcome)
            self.answered(number)
            self._answer(request)
            self._view.trial_changed(ended)
            self._on_closed(ended)
        elif request.kind == PAUSE:
            self.pause(number, request)
        elif request.kind == UNPAUSE:
            self._study.unpause(number, request.text)
            self._answer(request)
            self._view.say(f"trial {number} goes on: {request.text}")

    def ends(self, number: int) -> Outcome | None:
        """How this trial is to end by hand; None: it goes on."""
        request = self._ending.get(number)
        return None if request is None else by_hand(request)

    def pauses(self, number: int) -> bool:
        """Its worker has let go of it: if it was to be paused it is now, and True."""
        request = self._pausing.get(number)
        if request is None:
            return False
        self.pause(number, request)
        return True

    def pause(self, number: int, request: Request) -> None:
        """Put the trial aside."""
        tags = {"state": TrialState.PAUSED.value, "reason": request.text}
        self._sink.end(str(number), status=PAUSED_STATUS, tags=tags, at=time.time())
        self._study.pause(number, request.text)
        self._answer(request)
        self._pausing.pop(number, None)
        paused = self._study.trial(number)
        assert paused is not None
        self._view.trial_changed(paused)

    def answered(self, number: int) -> None:
        """The trial has ended, by hand or before a hand reached it."""
        for waiting in (self._ending, self._pausing):
            request = waiting.pop(number, None)
            if request is not None:
                self._answer(request)

    def _answer(self, request: Request, said: str = "") -> None:
        self._study.done(request.seq)
        if said:
            self._study.note("answered", said, request.trial)
            self._view.say(said)


def by_hand(request: Request) -> Outcome:
    """How a trial ends that somebody ended."""
    return Outcome(TrialState.PRUNED, f"by hand: {request.text}")


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


_POLL_SECONDS = 0.5


def wait(study: Study, view: View, interrupt: Interrupt, why: str) -> Stop | None:
    """Until the sweep is unpaused (None), stopped or interrupted. Requests about single trials wait as well."""
    study.rest(why)
    view.stage(f"paused: {why}; `orchestrate unpause {study.folder.name}` goes on")
    while True:
        view.tick()
        study.beat()
        if interrupt.asked:
            return Stop(StopKind.INTERRUPTED)
        for request in study.requests():
            if request.trial is None:
                study.done(request.seq)
                if request.kind == STOP:
                    return Stop(StopKind.STOPPED, request.text)
                if request.kind == UNPAUSE:
                    study.wake(request.text)
                    view.say(f"goes on: {request.text}")
                    return None
        time.sleep(_POLL_SECONDS)


def held_over(study: Study) -> list[str]:
    """What an earlier pause still holds, or no longer does, in words: to be told before this driver begins."""
    name = study.folder.name
    said: list[str] = []
    if why := study.paused():
        said.append(f"{name} was paused when its last driver ended ({why}): it goes on now")
    for record in study.trials():
        if record.state is TrialState.PAUSED:
            again = f"`orchestrate unpause {name} {record.number}` takes it up again"
            said.append(f"trial {record.number} stays paused ({record.reason}): {again}")
    return said


def left_over(study: Study) -> Stop:
    """How a sweep ended that has nothing more to run."""
    aside = [str(r.number) for r in study.trials() if r.state is TrialState.PAUSED]
    if aside:
        first = f"orchestrate unpause {study.folder.name} {aside[0]}"
        return Stop(StopKind.PUT_ASIDE, f"nothing is left to do but what is paused: {', '.join(aside)}; `{first}`")
    return Stop(StopKind.FINISHED, study.exhausted())
