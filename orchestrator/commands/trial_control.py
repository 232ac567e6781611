"""Hands on a sweep from any terminal: what is asked is checked here and now, and done by the driver.

Trials that people give are in given.py.

Trials that people give a sweep: checked here and now, queued in the study, run next.

A clone from a checkpoint: which one it is, and whether the clone can go on under it.
"""

from __future__ import annotations

import getpass
import os
import shutil
import socket
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from orchestrator import folders
from orchestrator.driver.checkpoint_retention import making
from orchestrator.errors import Finding, OrchestrateError, SpecError
from orchestrator.folders import SweepFolder, existing
from orchestrator.spec.loading.yaml_document import parse
from orchestrator.spec.search.manual_trials import Problem, fork_problems, outside, params_of, problems, valid
from orchestrator.spec.search.space import SearchSpace
from orchestrator.spec.search.trial_params import KIND, TWINS, place
from orchestrator.spec.sweep_spec import SweepSpec
from orchestrator.study.database.driver_lease import PAUSE, PRUNE, STOP, UNPAUSE
from orchestrator.study.reader import StudyReader
from orchestrator.study.trial_records import Fork, TrialRecord, TrialState
from trainer.config.trial import TrialConfig
from trainer.storage.atomic_files import write_text
from trainer.storage.checkpoint_manifest import pin
from trainer.training.schedule import total_updates


class CannotDo(OrchestrateError):
    """What was asked makes no sense for this sweep or trial as it stands; nothing was changed."""


def ask(name: str, root: Path, kind: str, trial: int | None, why: str = "") -> list[str]:
    """Leave a request (stop, pause, unpause, prune) for the driver; what will come of it, in sentences."""
    folder = existing(root, name)
    driven = folders.holder(folder) is not None
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


_SAMPLES = "samples.jsonl"


@contextmanager
def held_checkpoint(study: StudyReader, parent: TrialRecord, config: TrialConfig) -> Generator[Fork]:
    """The newest good checkpoint of `parent`, held for a trial with this configuration that is queued inside.

    Whatever goes wrong inside, it is let go of again; a killed process leaves it to the driver.
    """
    folder, name = study.folder, study.folder.name
    anew = "without --from-checkpoint the clone begins from the start model"
    if parent.state.finished:
        gone = "and the checkpoints of an ended trial are removed"
        raise CannotDo(f"trial {parent.number} of {name} is {parent.state}, {gone}; {anew}")
    runs = [folder.attempt(parent.number, attempt) for attempt in range(1, parent.attempts + 1)]
    if parent.fork is not None:
        runs.insert(0, folder.forks / parent.fork.place)
    to = folder.forks / uuid4().hex
    with making(folder), ExitStack() as undo:
        undo.callback(shutil.rmtree, to, ignore_errors=True)
        step, passed = pin(runs, to)
        if step is None:
            told = "; ".join(passed) or "the first is written after `training.save_steps` updates"
            raise CannotDo(f"trial {parent.number} of {name} has no good checkpoint yet: {told}; {anew}")
        _check_length(study, parent, config, step)
        answers = next((run / _SAMPLES for run in reversed(runs) if (run / _SAMPLES).is_file()), None)
        if answers is not None:
            write_text(to / _SAMPLES, answers.read_text(encoding="utf-8"))
        yield Fork(step, to.name)
        undo.pop_all()


def _check_length(study: StudyReader, parent: TrialRecord, config: TrialConfig, step: int) -> None:
    pairs = study.settled.train_pairs
    if pairs is None and config.training.max_steps is None:
        return
    total = total_updates(config.training, pairs or config.training.pairs_per_update)
    if total <= step:
        raise CannotDo(
            f"the newest checkpoint of trial {parent.number} is of update {step}, and the clone would have {total}: "
            f"set training.max_steps above {step}"
        )


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
        return [*said, *_beyond(study.spec, leaves), *later(name, folders.holder(folder) is not None)]


def clone(
    name: str, root: Path, trial: int, sets: Sequence[str], why: str = "", *, from_checkpoint: bool = False
) -> list[str]:
    """Queue a trial like another one with these leaves changed: from the start model, or from its newest checkpoint."""
    folder = existing(root, name)
    with open_study(folder) as study:
        parent, base = record_of(study, trial), study.spec.base
        changed = _leaves(sets)
        leaves = _like(parent.params, changed)
        _check(study.spec, sets, leaves)
        before, after = place(base, parent.params), place(base, leaves)
        if before.identity() == after.identity():
            raise CannotDo(f"a clone of trial {trial} that changes nothing would be the same again; give --set ...")
        from_ = ""
        fork = None
        with ExitStack() as holding:
            if from_checkpoint:
                _refuse(sets, fork_problems(before, after, changed))
                fork = holding.enter_context(held_checkpoint(study, parent, after))
                from_ = f" from its checkpoint of update {fork.step}"
            like = f"clone of trial {trial}{from_} with {_shown(changed)}"
            origin = f"{like}, by {who()}" + (f": {why}" if why else "")
            study.give(leaves, origin, kind="cloned", parent=trial, fork=fork)
        said = [f"queued a {like}: it runs next, on top of budget.trials"]
        if fork is not None:
            said.append("the sampler does not learn from it: its result is that of two settings, one after the other")
        else:
            said += _beyond(study.spec, leaves)
        return [*said, *later(name, folders.holder(folder) is not None)]


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
    _refuse(sets, problems(spec.base, spec.search, spec.goal, leaves), spec.search)


def _refuse(sets: Sequence[str], found: Iterable[Problem], search: SearchSpace | None = None) -> None:
    """SpecError with every problem at its flag, where there is one."""
    flags = {one.partition("=")[0].strip().removeprefix("base."): one for one in sets}
    findings: list[Finding] = []
    for path, problem, hint in found:
        drawn = "" if search is None else valid(search, path)
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


def _shown(leaves: Mapping[str, Any]) -> str:
    return ", ".join(f"{path}={value}" for path, value in leaves.items())
