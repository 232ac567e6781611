"""Hands on a sweep from any terminal: what is asked is checked here and now, and done by the driver."""

from __future__ import annotations

import getpass
import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator.driving import lock
from orchestrator.errors import Finding, OrchestrateError, SpecError
from orchestrator.folders import SweepFolder, existing
from orchestrator.spec.document import parse
from orchestrator.spec.given import outside, params_of, problems, valid
from orchestrator.spec.place import KIND, TWINS
from orchestrator.spec.sweep import SweepSpec
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
            said = _trial(_record(study, trial), kind, driven, name)
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
    return [f"asked trial {number} of {name} {will}", *_later(name, driven)]


def enqueue(name: str, root: Path, sets: Sequence[str]) -> list[str]:
    """Queue a trial with these leaves over the sweep's base; SpecError with every finding when it is none."""
    folder = existing(root, name)
    with open_study(folder) as study:
        leaves = _leaves(sets)
        _check(study.spec, sets, leaves)
        if not leaves:
            raise CannotDo("give what the trial has: --set loss.beta=3 --set loss.gamma=1")
        study.give(leaves, f"enqueued by {who()}", kind="enqueued")
        said = [f"queued a trial with {_shown(leaves)}: it runs next, on top of budget.trials"]
        return [*said, *_beyond(study.spec, leaves), *_later(name, lock.holder(folder) is not None)]


def clone(name: str, root: Path, trial: int, sets: Sequence[str], why: str = "") -> list[str]:
    """Queue a trial like another one, with these leaves changed, from the start model."""
    folder = existing(root, name)
    with open_study(folder) as study:
        parent = _record(study, trial)
        changed = _leaves(sets)
        leaves = _like(parent.params, changed)
        _check(study.spec, sets, leaves)
        if not changed:
            raise CannotDo(f"a clone of trial {trial} that changes nothing would be the same again; give --set ...")
        origin = f"clone of trial {trial} with {_shown(changed)}, by {who()}" + (f": {why}" if why else "")
        study.give(leaves, origin, kind="cloned", parent=trial)
        said = [f"queued a clone of trial {trial} with {_shown(changed)}: it runs next, on top of budget.trials"]
        return [*said, *_beyond(study.spec, leaves), *_later(name, lock.holder(folder) is not None)]


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


def _record(study: StudyReader, number: int) -> TrialRecord:
    records = study.trials()
    found = next((r for r in records if r.number == number), None)
    if found is None:
        there = f"it has 0 to {len(records) - 1}" if records else "none has begun"
        raise CannotDo(f"{study.folder.name} has no trial {number} ({there})")
    return found


def _like(parent: Mapping[str, Any], changed: Mapping[str, Any]) -> dict[str, Any]:
    """The parent's leaves under the changed ones; another kind of loss brings its own defaults."""
    other = changed.get(KIND, parent.get(KIND)) != parent.get(KIND)
    kept = {p: v for p, v in parent.items() if TWINS.get(p) not in changed and not (other and p.startswith("loss."))}
    return {**kept, **changed}


def _leaves(sets: Sequence[str]) -> dict[str, Any]:
    """What the flags set."""
    given: dict[str, Any] = {}
    findings: list[Finding] = []
    for one in sets:
        path, equals, text = one.partition("=")
        if not equals or not path.strip():
            findings.append(Finding(f"--set {one}", "", "must be PATH=VALUE, such as loss.beta=2.5"))
            continue
        try:
            given[path.strip().removeprefix("base.")] = parse(text, one).value if text.strip() else None
        except SpecError as error:
            findings += [Finding(f"--set {one}", path, f.problem, f.hint) for f in error.findings]
    if findings:
        raise SpecError(findings)
    return given


def _check(spec: SweepSpec, sets: Sequence[str], leaves: Mapping[str, Any]) -> None:
    flags = {one.partition("=")[0].strip().removeprefix("base."): one for one in sets}
    findings: list[Finding] = []
    for path, problem, hint in problems(spec.base, spec.search, spec.goal, leaves):
        drawn = valid(spec.search, path)
        hints = [h for h in (hint, f"the search has {drawn}" if drawn else "") if h]
        where = f"--set {flags[path]}" if path in flags else "--set"
        findings.append(Finding(where, path, problem, "; ".join(hints)))
    if findings:
        raise SpecError(findings)


def _beyond(spec: SweepSpec, leaves: Mapping[str, Any]) -> list[str]:
    """What the sampler cannot learn from."""
    beyond = outside(spec.search, params_of(spec.base, spec.search, leaves))
    if not beyond:
        return []
    told = ", ".join(f"{path} ({valid(spec.search, path) or 'not searched'})" for path in beyond)
    return [f"outside the search: {told}; it may win, and the sampler does not learn from it"]


def _later(name: str, driven: bool) -> list[str]:
    return [] if driven else [f"nobody drives {name} now: done at the next `orchestrate resume {name}`"]


def _shown(leaves: Mapping[str, Any]) -> str:
    return ", ".join(f"{path}={value}" for path, value in leaves.items())
