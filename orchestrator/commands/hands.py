"""Hands on a sweep from any terminal: what is asked is checked here and now, and done by the driver.

Trials that people give are in given.py.
"""

from __future__ import annotations

import getpass
import os
import socket
from pathlib import Path

from orchestrator.driving import lock
from orchestrator.errors import OrchestrateError
from orchestrator.folders import SweepFolder, existing
from orchestrator.study.driver import PAUSE, PRUNE, STOP, UNPAUSE
from orchestrator.study.reader import StudyReader
from orchestrator.study.records import TrialRecord
from orchestrator.study.state import TrialState


class CannotDo(OrchestrateError):
    """What was asked makes no sense for this sweep or trial as it stands; nothing was changed."""


def ask(name: str, root: Path, kind: str, trial: int | None, why: str = "") -> list[str]:
    """Leave a request (stop, pause, unpause, prune) for the driver; what will come of it, in sentences."""
    folder = existing(root, name)
    driven = lock.holder(folder) is not None
    with open_study(folder) as study:
        if trial is None:
            said = _sweep(study, kind, driven)
        else:
            said = _trial(record_of(study, trial), kind, driven, name)
        text = f"{why} (by {who()})" if why else f"by {who()}"
        study.request(kind, text, trial)
        study.note("asked", f"{kind}: {text}", trial)
    return said


def _sweep(study: StudyReader, kind: str, driven: bool) -> list[str]:
    name = study.folder.name
    if not driven:
        again = f"`orchestrate resume {name}` goes on with it"
        raise CannotDo(f"nobody drives {name}, so there is nothing to {kind}; {again}")
    paused = bool(study.paused())
    if paused == (kind == PAUSE) and kind in (PAUSE, UNPAUSE):
        raise CannotDo(f"{name} is {'paused already' if paused else 'not paused'}")
    match kind:
        case "pause":
            running = sum(r.state is TrialState.RUNNING for r in study.trials())
            goes_on = f"`orchestrate unpause {name}` goes on"
            return [f"asked {name} to pause: nothing new begins, {running} running trials checkpoint; {goes_on}"]
        case "unpause":
            return [f"asked {name} to go on"]
        case _:
            return [f"asked {name} to stop; `orchestrate resume {name}` goes on with it"]


def _trial(record: TrialRecord, kind: str, driven: bool, name: str) -> list[str]:
    number, state = record.number, record.state
    if state.finished:
        raise CannotDo(f"trial {number} of {name} is {state}, which is final: there is nothing to {kind}")
    if kind == PAUSE and state is TrialState.PAUSED:
        raise CannotDo(f"trial {number} of {name} is paused already: {record.reason}")
    if kind == UNPAUSE and state is not TrialState.PAUSED and driven:
        raise CannotDo(f"trial {number} of {name} is not paused")
    will = {
        STOP: "to end as PRUNED",
        PRUNE: "to end as PRUNED",
        PAUSE: f"to checkpoint and give its slot to the next; `orchestrate unpause {name} {number}` takes it up again",
        UNPAUSE: "to go on before any new trial",
    }[kind]
    return [f"asked trial {number} of {name} {will}", *later(name, driven)]


def open_study(folder: SweepFolder) -> StudyReader:
    """The study of a sweep whose trials have begun, or are about to."""
    if not StudyReader.exists(folder):
        raise CannotDo(f"{folder.name} is still preparing its data: it has no trials yet")
    return StudyReader.open(folder)


def who() -> str:
    """The person at this terminal, for the record."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        user = f"uid {os.getuid()}"
    return f"{user}@{socket.gethostname()}, pid {os.getpid()}"


def record_of(study: StudyReader, number: int) -> TrialRecord:
    """The trial of that number; CannotDo where there is none."""
    records = study.trials()
    found = next((r for r in records if r.number == number), None)
    if found is None:
        there = f"it has 0 to {len(records) - 1}" if records else "none has begun"
        raise CannotDo(f"{study.folder.name} has no trial {number} ({there})")
    return found


def later(name: str, driven: bool) -> list[str]:
    """When it will be done, where nobody drives."""
    return [] if driven else [f"nobody drives {name} now: done at the next `orchestrate resume {name}`"]
