"""What is paused: a sweep as a whole, whose driver stays and waits; or single trials, which may be all that is left."""

from __future__ import annotations

import time

from orchestrator.engine.stopping import Interrupt, Stop, StopKind
from orchestrator.engine.view import View
from orchestrator.study.driver import STOP, UNPAUSE
from orchestrator.study.state import TrialState
from orchestrator.study.study import Study

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
