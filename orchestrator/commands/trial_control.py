"""Requests to a sweep from any terminal: stop, pause, prune, enqueue, clone.

A request is checked here and carried out by the driver. Enqueued trials wait in the study and run next. A clone may
continue from a checkpoint of the trial that it copies, if its settings allow that.
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
from orchestrator.driver.checkpoint_retention import fork_lock
from orchestrator.errors import Finding, OrchestrateError, SpecError
from orchestrator.folders import SweepFolder, existing_sweep
from orchestrator.spec.loading.validation_errors import parse_document
from orchestrator.spec.search.manual_trials import (
    Problem,
    allowed_values,
    check_fork,
    check_manual_trial,
    manual_params,
    out_of_space,
)
from orchestrator.spec.search.space import SearchSpace
from orchestrator.spec.search.trial_params import EQUIVALENT_PATHS, LOSS_KIND, apply_params
from orchestrator.spec.sweep_spec import SweepSpec
from orchestrator.study.database.driver_lease import PAUSE, PRUNE, STOP, UNPAUSE
from orchestrator.study.reader import StudyReader
from orchestrator.study.trial_records import Fork, TrialRecord, TrialState
from trainer.config.trial import TrialConfig
from trainer.storage.atomic_files import write_text
from trainer.storage.checkpoint_manifest import pin_checkpoint
from trainer.training.schedule import total_updates


class RequestRefused(OrchestrateError):
    """What was asked makes no sense for this sweep or trial as it stands; nothing was changed."""


def request_control(name: str, root: Path, kind: str, trial: int | None, reason: str = "") -> list[str]:
    """Leave a request (stop, pause, unpause, prune) for the driver; what will come of it, in sentences."""
    folder = existing_sweep(root, name)
    driven = folders.lock_holder(folder) is not None
    with open_study(folder) as study:
        if trial is None:
            notices = _sweep_request(study, kind, driven)
        else:
            notices = _trial_request(record_of(study, trial), kind, driven, name)
        text = f"{reason} (by {current_user()})" if reason else f"by {current_user()}"
        study.add_request(kind, text, trial)
        study.add_event("asked", f"{kind}: {text}", trial)
    return notices


def _sweep_request(study: StudyReader, kind: str, driven: bool) -> list[str]:
    name = study.folder.name
    if not driven:
        again = f"`orchestrate resume {name}` goes on with it"
        raise RequestRefused(f"nobody drives {name}, so there is nothing to {kind}; {again}")
    paused = bool(study.pause_reason())
    if paused == (kind == PAUSE) and kind in (PAUSE, UNPAUSE):
        raise RequestRefused(f"{name} is {'paused already' if paused else 'not paused'}")
    match kind:
        case "pause":
            running = sum(r.state is TrialState.RUNNING for r in study.trials())
            goes_on = f"`orchestrate unpause {name}` goes on"
            return [f"asked {name} to pause: nothing new begins, {running} running trials checkpoint; {goes_on}"]
        case "unpause":
            return [f"asked {name} to go on"]
        case _:
            return [f"asked {name} to stop; `orchestrate resume {name}` goes on with it"]


def _trial_request(record: TrialRecord, kind: str, driven: bool, name: str) -> list[str]:
    number, state = record.number, record.state
    if state.finished:
        raise RequestRefused(f"trial {number} of {name} is {state}, which is final: there is nothing to {kind}")
    if kind == PAUSE and state is TrialState.PAUSED:
        raise RequestRefused(f"trial {number} of {name} is paused already: {record.reason}")
    if kind == UNPAUSE and state is not TrialState.PAUSED and driven:
        raise RequestRefused(f"trial {number} of {name} is not paused")
    will = {
        STOP: "to end as PRUNED",
        PRUNE: "to end as PRUNED",
        PAUSE: f"to checkpoint and give its slot to the next; `orchestrate unpause {name} {number}` takes it up again",
        UNPAUSE: "to go on before any new trial",
    }[kind]
    return [f"asked trial {number} of {name} {will}", *when_applied(name, driven)]


def open_study(folder: SweepFolder) -> StudyReader:
    """The study of a sweep whose trials have begun, or are about to."""
    if not StudyReader.exists(folder):
        raise RequestRefused(f"{folder.name} is still preparing its data: it has no trials yet")
    return StudyReader.open(folder)


def current_user() -> str:
    """The person at this terminal, for the record."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        user = f"uid {os.getuid()}"
    return f"{user}@{socket.gethostname()}, pid {os.getpid()}"


def record_of(study: StudyReader, number: int) -> TrialRecord:
    """The trial of that number; RequestRefused where there is none."""
    records = study.trials()
    found = next((r for r in records if r.number == number), None)
    if found is None:
        there = f"it has 0 to {len(records) - 1}" if records else "none has begun"
        raise RequestRefused(f"{study.folder.name} has no trial {number} ({there})")
    return found


def when_applied(name: str, driven: bool) -> list[str]:
    """When it will be done, where nobody drives."""
    return [] if driven else [f"nobody drives {name} now: done at the next `orchestrate resume {name}`"]


_SAMPLES = "samples.jsonl"


@contextmanager
def pinned_checkpoint(study: StudyReader, parent: TrialRecord, config: TrialConfig) -> Generator[Fork]:
    """The newest good checkpoint of `parent`, held for a trial with this configuration that is queued inside.

    Whatever goes wrong inside, it is let go of again; a killed process leaves it to the driver.
    """
    folder, name = study.folder, study.folder.name
    anew = "without --from-checkpoint the clone begins from the start model"
    if parent.state.finished:
        gone = "and the checkpoints of an ended trial are removed"
        raise RequestRefused(f"trial {parent.number} of {name} is {parent.state}, {gone}; {anew}")
    runs = [folder.attempt(parent.number, attempt) for attempt in range(1, parent.attempts + 1)]
    if parent.fork is not None:
        runs.insert(0, folder.forks / parent.fork.place)
    to = folder.forks / uuid4().hex
    with fork_lock(folder), ExitStack() as undo:
        undo.callback(shutil.rmtree, to, ignore_errors=True)
        step, passed = pin_checkpoint(runs, to)
        if step is None:
            reasons = "; ".join(passed) or "the first is written after `training.save_steps` updates"
            raise RequestRefused(f"trial {parent.number} of {name} has no good checkpoint yet: {reasons}; {anew}")
        _check_length(study, parent, config, step)
        answers = next((run / _SAMPLES for run in reversed(runs) if (run / _SAMPLES).is_file()), None)
        if answers is not None:
            write_text(to / _SAMPLES, answers.read_text(encoding="utf-8"))
        yield Fork(step, to.name)
        undo.pop_all()


def _check_length(study: StudyReader, parent: TrialRecord, config: TrialConfig, step: int) -> None:
    pairs = study.terms.train_pairs
    if pairs is None and config.training.max_steps is None:
        return
    total = total_updates(config.training, pairs or config.training.pairs_per_update)
    if total <= step:
        raise RequestRefused(
            f"the newest checkpoint of trial {parent.number} is of update {step}, and the clone would have {total}: "
            f"set training.max_steps above {step}"
        )


def enqueue(name: str, root: Path, sets: Sequence[str]) -> list[str]:
    """Queue a trial with these settings over the sweep's base; SpecError with every finding when it is none."""
    folder = existing_sweep(root, name)
    with open_study(folder) as study:
        params = _parse_sets(sets)
        _check(study.spec, sets, params)
        if not params:
            raise RequestRefused("give what the trial has: --set loss.beta=3 --set loss.gamma=1")
        study.enqueue(params, f"enqueued by {current_user()}", kind="enqueued")
        notices = [f"queued a trial with {_format_params(params)}: it runs next, on top of budget.trials"]
        return [
            *notices,
            *_out_of_space_notice(study.spec, params),
            *when_applied(name, folders.lock_holder(folder) is not None),
        ]


def clone(
    name: str, root: Path, trial: int, sets: Sequence[str], reason: str = "", *, from_checkpoint: bool = False
) -> list[str]:
    """Enqueue a copy of a trial with these settings changed.

    The clone starts from the initial model, or with `from_checkpoint` from the trial's newest checkpoint.
    """
    folder = existing_sweep(root, name)
    with open_study(folder) as study:
        parent, base = record_of(study, trial), study.spec.base
        changed = _parse_sets(sets)
        params = _clone_params(parent.params, changed)
        _check(study.spec, sets, params)
        before, after = apply_params(base, parent.params), apply_params(base, params)
        if before.canonical_params() == after.canonical_params():
            raise RequestRefused(
                f"a clone of trial {trial} that changes nothing would be the same again; give --set ..."
            )
        from_ = ""
        fork = None
        with ExitStack() as holding:
            if from_checkpoint:
                _raise_problems(sets, check_fork(before, after, changed))
                fork = holding.enter_context(pinned_checkpoint(study, parent, after))
                from_ = f" from its checkpoint of update {fork.step}"
            like = f"clone of trial {trial}{from_} with {_format_params(changed)}"
            origin = f"{like}, by {current_user()}" + (f": {reason}" if reason else "")
            study.enqueue(params, origin, kind="cloned", parent=trial, fork=fork)
        notices = [f"queued a {like}: it runs next, on top of budget.trials"]
        if fork is not None:
            notices.append(
                "the sampler does not learn from it: its result is that of two settings, one after the other"
            )
        else:
            notices += _out_of_space_notice(study.spec, params)
        return [*notices, *when_applied(name, folders.lock_holder(folder) is not None)]


def _clone_params(parent: Mapping[str, Any], changed: Mapping[str, Any]) -> dict[str, Any]:
    """The parent's settings under the changed ones; another kind of loss brings its own defaults."""
    other = changed.get(LOSS_KIND, parent.get(LOSS_KIND)) != parent.get(LOSS_KIND)
    inherited = {
        p: v
        for p, v in parent.items()
        if EQUIVALENT_PATHS.get(p) not in changed and not (other and p.startswith("loss."))
    }
    return {**inherited, **changed}


def _parse_sets(sets: Sequence[str]) -> dict[str, Any]:
    """What the flags set."""
    given: dict[str, Any] = {}
    findings: list[Finding] = []
    for one in sets:
        path, equals, text = one.partition("=")
        if not equals or not path.strip():
            findings.append(Finding(f"--set {one}", "", "must be PATH=VALUE, such as loss.beta=2.5"))
            continue
        try:
            given[path.strip().removeprefix("base.")] = parse_document(text, one).value if text.strip() else None
        except SpecError as error:
            findings += [Finding(f"--set {one}", path, f.problem, f.hint) for f in error.findings]
    if findings:
        raise SpecError(findings)
    return given


def _check(spec: SweepSpec, sets: Sequence[str], params: Mapping[str, Any]) -> None:
    _raise_problems(sets, check_manual_trial(spec.base, spec.search, spec.goal, params), spec.search)


def _raise_problems(sets: Sequence[str], found: Iterable[Problem], search: SearchSpace | None = None) -> None:
    """SpecError with every problem at its flag, where there is one."""
    flags = {one.partition("=")[0].strip().removeprefix("base."): one for one in sets}
    findings: list[Finding] = []
    for path, problem, hint in found:
        sampled = "" if search is None else allowed_values(search, path)
        hints = [h for h in (hint, f"the search has {sampled}" if sampled else "") if h]
        where = f"--set {flags[path]}" if path in flags else "--set"
        findings.append(Finding(where, path, problem, "; ".join(hints)))
    if findings:
        raise SpecError(findings)


def _out_of_space_notice(spec: SweepSpec, params: Mapping[str, Any]) -> list[str]:
    """What the sampler cannot learn from."""
    beyond = out_of_space(spec.search, manual_params(spec.base, spec.search, params))
    if not beyond:
        return []
    reasons = ", ".join(f"{path} ({allowed_values(spec.search, path) or 'not searched'})" for path in beyond)
    return [f"outside the search: {reasons}; it may win, and the sampler does not learn from it"]


def _format_params(params: Mapping[str, Any]) -> str:
    return ", ".join(f"{path}={value}" for path, value in params.items())
