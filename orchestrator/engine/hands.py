"""Requests about single trials. Each stays in the study until it has had its effect: no kill of a driver loses it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from orchestrator.engine.messages import Job
from orchestrator.engine.view import View
from orchestrator.study.driver import PAUSE, PRUNE, STOP, UNPAUSE
from orchestrator.study.records import Request, TrialRecord
from orchestrator.study.state import Outcome, TrialState
from orchestrator.study.study import Study
from orchestrator.tracking.sink import Sink

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
