"""User requests to a sweep: stop, pause, unpause, prune, enqueue, clone.

A request is validated here, stored in the study and carried out by the driver. Enqueued trials run next. A clone can
start from a checkpoint of the trial that it copies, if its changed settings allow that.
"""

from __future__ import annotations

import getpass
import os
import shutil
import socket
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

from orchestrator import folders
from orchestrator.commands.enqueue_checks import (
    check_like_plan,
    equal_trial,
    expand_options,
    options_of,
    waits_already,
    with_another_seed,
)
from orchestrator.driver.checkpoint_retention import fork_lock
from orchestrator.errors import OrchestrateError, SpecError, SpecProblem
from orchestrator.folders import SweepFolder, existing_sweep
from orchestrator.spec.loading.overrides import parse_overrides
from orchestrator.spec.loading.right_forms import option_form
from orchestrator.spec.samplers import StagedSampler
from orchestrator.spec.search.manual_trials import (
    allowed_values,
    check_fork,
    check_manual_trial,
    out_of_space,
    resolve_params,
    short_value,
)
from orchestrator.spec.search.space import SearchSpace
from orchestrator.spec.search.trial_params import (
    EQUIVALENT_PATHS,
    LOSS_KIND,
    SEED,
    apply_params,
    config_paths,
    list_as_text,
)
from orchestrator.spec.sweep_spec import SweepSpec
from orchestrator.study.reader import StudyReader
from orchestrator.study.retried_trials import can_begin_again
from orchestrator.study.trial_records import REQUESTED_EVENT, Fork, RequestKind, TrialRecord, TrialState
from trainer.config.trial import TrialConfig
from trainer.results import clause
from trainer.storage.atomic_files import write_text
from trainer.storage.checkpoint_manifest import pin_checkpoint
from trainer.training.schedule import total_updates


class RequestRefused(OrchestrateError):
    """The request is invalid in the current state of the sweep or trial; nothing was changed."""


class NoSuchTrial(RequestRefused):
    """The sweep has no trial of this number."""


def request_control(name: str, root: Path, kind: str, trial: int | None, reason: str = "") -> list[str]:
    """Store a request (stop, pause, unpause, prune) for the driver: the writing side of a stop request.

    Args:
        name: the sweep.
        root: the runs folder.
        kind: a `RequestKind`.
        trial: number of the trial; None for the whole sweep.
        reason: reason of the user, stored with the request.

    Returns:
        Notices about the effect of the request.

    Raises:
        RequestRefused: the request is invalid in the current state.
    """
    folder = existing_sweep(root, name)
    has_driver = folders.driver_of(folder) is not None
    with open_study(folder) as study:
        if trial is None:
            notices = _sweep_request(study, kind, has_driver)
        else:
            record = record_of(study, trial)
            notices = _trial_request(record, kind, has_driver, name, will_be_paused=study.will_be_paused(trial))
        text = f"{reason} (by {current_user()})" if reason else f"by {current_user()}"
        study.add_request(kind, text, trial)
        study.add_event(REQUESTED_EVENT, f"{kind}: {text}", trial)
    return notices


def request_retries(name: str, root: Path, trials: Sequence[int], reason: str = "") -> list[str]:
    """Store requests to retry these failed trials; return notices.

    Raises:
        RequestRefused: one of them has not failed, or cannot begin again; nothing was requested.
    """
    folder = existing_sweep(root, name)
    with open_study(folder) as study:
        for record in (record_of(study, number) for number in trials):
            if record.state is not TrialState.FAILED:
                raise RequestRefused(
                    f"trial {record.number} of {name} is {record.state}, and only failed trials are retried; "
                    f"`orchestrate clone {name} {record.number} --set ...` tries it with other settings"
                )
            if not can_begin_again(record, folder):
                raise RequestRefused(
                    f"trial {record.number} of {name} began from a checkpoint of trial {record.parent}, which was "
                    "removed after its failure; clone that trial again"
                )
        text = f"{reason} (by {current_user()})" if reason else f"by {current_user()}"
        for number in dict.fromkeys(trials):
            study.add_request(RequestKind.RETRY, text, number)
            study.add_event(REQUESTED_EVENT, f"{RequestKind.RETRY}: {text}", number)
    listed = ", ".join(str(number) for number in dict.fromkeys(trials))
    notice = f"requested a retry of {listed} of {name}: from the initial model, before any new trial"
    return [notice, *when_applied(name, folders.driver_of(folder) is not None)]


def _sweep_request(study: StudyReader, kind: str, has_driver: bool) -> list[str]:
    name = study.folder.name
    if (holder := folders.lock_holder(study.folder)) is not None and not has_driver:
        raise RequestRefused(f"{name} is not running: there is nothing to {kind}; it is held by {holder}")
    if not has_driver:
        raise RequestRefused(f"{name} is not running: there is nothing to {kind}; `orchestrate resume {name}` runs it")
    if kind in (RequestKind.PAUSE, RequestKind.UNPAUSE):
        is_paused, will_be = bool(study.pause_reason()), study.will_be_paused()
        if will_be == (kind == RequestKind.PAUSE):
            already = "paused already" if is_paused else "being paused already"
            still = "being continued already" if is_paused else "not paused"
            raise RequestRefused(f"{name} is {already if will_be else still}")
    match kind:
        case RequestKind.PAUSE:
            running = sum(r.state is TrialState.RUNNING for r in study.trials())
            return [
                f"requested a pause of {name}: {running} running trials are checkpointed, no new ones start; "
                f"`orchestrate unpause {name}` continues it"
            ]
        case RequestKind.UNPAUSE:
            return [f"requested to continue {name}"]
        case "abandon":
            return [f"requested the end of {name}: running trials stop, unfinished ones end as PRUNED"]
        case _:
            return [f"requested a stop of {name}; `orchestrate resume {name}` resumes it"]


def _trial_request(record: TrialRecord, kind: str, has_driver: bool, name: str, *, will_be_paused: bool) -> list[str]:
    number, state = record.number, record.state
    if state.is_final:
        raise RequestRefused(f"trial {number} of {name} is {state}, which is final: there is nothing to {kind}")
    if kind == RequestKind.PAUSE and state is TrialState.PAUSED:
        raise RequestRefused(f"trial {number} of {name} is paused already: {record.reason}")
    if kind == RequestKind.UNPAUSE and state is not TrialState.PAUSED and has_driver and not will_be_paused:
        raise RequestRefused(f"trial {number} of {name} is not paused")
    effect = {
        RequestKind.STOP: "it ends as PRUNED",
        RequestKind.PRUNE: "it ends as PRUNED",
        RequestKind.PAUSE: f"it is checkpointed and frees its slot; `orchestrate unpause {name} {number}` continues it",
        RequestKind.UNPAUSE: "it continues before any new trial",
    }[RequestKind(kind)]
    return [f"requested to {kind} trial {number} of {name}: {effect}", *when_applied(name, has_driver)]


def open_study(folder: SweepFolder, *, read_only: bool = False) -> StudyReader:
    """Open the study of a sweep; `read_only`: as `StudyReader.open`.

    Raises:
        RequestRefused: the sweep has no study before its data is prepared.
    """
    if not StudyReader.exists(folder):
        name, is_preparing = folder.name, folders.lock_holder(folder) is not None
        why = "is still preparing its data" if is_preparing else f"is not running (`orchestrate resume {name}` runs it)"
        raise RequestRefused(f"{name} {why}: it has no trials yet")
    return StudyReader.open(folder, read_only=read_only)


_PERSON: ContextVar[str] = ContextVar("person", default="")


@contextmanager
def acting_for(person: str) -> Generator[None]:
    """Store this person with the requests of the context, beside the user whose process makes them."""
    token = _PERSON.set(person)
    try:
        yield
    finally:
        _PERSON.reset(token)


def acting_person() -> str:
    """Return the person of the service whose request is being answered; "" in a command."""
    return _PERSON.get()


def current_user() -> str:
    """Return user, host and process id, stored with requests; before them the person for whom the service acts."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a user id without a name, as in containers
        user = f"uid {os.getuid()}"
    person = f"{found} through " if (found := _PERSON.get()) else ""
    return f"{person}{user}@{socket.gethostname()}, pid {os.getpid()}"


def record_of(study: StudyReader, number: int) -> TrialRecord:
    """Return the trial with this number.

    Raises:
        RequestRefused: there is none.
    """
    records = study.trials()
    found = next((r for r in records if r.number == number), None)
    if found is None:
        existing = f"it has 0 to {len(records) - 1}" if records else "none has started"
        raise NoSuchTrial(f"{study.folder.name} has no trial {number} ({existing})")
    return found


def when_applied(name: str, has_driver: bool) -> list[str]:
    """Return a notice where no driver runs, so that the request waits for the next one."""
    return [] if has_driver else [f"{name} is not running: the request takes effect at `orchestrate resume {name}`"]


_SAMPLES = "samples.jsonl"


@contextmanager
def pinned_checkpoint(study: StudyReader, parent: TrialRecord, config: TrialConfig) -> Generator[Fork]:
    """Pin the newest valid checkpoint of `parent` while a clone with this configuration is enqueued in the context.

    On an error in the context the copy is removed; after a kill the driver removes it.

    Raises:
        RequestRefused: there is no valid checkpoint, or the clone would end before it.
    """
    folder, name = study.folder, study.folder.name
    hint = "without --from-checkpoint the clone starts from the initial model"
    if parent.state.is_final:
        raise RequestRefused(
            f"trial {parent.number} of {name} is {parent.state}, and checkpoints of finished trials are removed; {hint}"
        )
    runs = [folder.attempt(parent.number, attempt) for attempt in range(1, parent.attempts + 1)]
    if parent.fork is not None:
        runs.insert(0, folder.forks / parent.fork.folder_name)
    to = folder.forks / uuid4().hex
    with fork_lock(folder), ExitStack() as undo:
        undo.callback(shutil.rmtree, to, ignore_errors=True)
        step, rejected = pin_checkpoint(runs, to)
        if step is None:
            reasons = "; ".join(rejected) or "the first is written after `training.save_steps` updates"
            raise RequestRefused(
                f"trial {parent.number} of {name} has no valid checkpoint yet: {clause(reasons)}; {hint}"
            )
        _check_length(study, parent, config, step)
        samples = next((run / _SAMPLES for run in reversed(runs) if (run / _SAMPLES).is_file()), None)
        if samples is not None:
            write_text(to / _SAMPLES, samples.read_text(encoding="utf-8"))
        yield Fork(step, to.name)
        undo.pop_all()


def _check_length(study: StudyReader, parent: TrialRecord, config: TrialConfig, step: int) -> None:
    pairs = study.terms.train_pairs
    if pairs is None and config.training.max_steps is None:
        return
    total = total_updates(config.training, pairs or config.training.pairs_per_update)
    if total <= step:
        raise RequestRefused(
            f"the newest checkpoint of trial {parent.number} is of update {step}, but the clone has {total} updates: "
            f"set training.max_steps above {step}"
        )


def enqueue_trial(name: str, root: Path, overrides: Sequence[str], *, again: bool = False) -> list[str]:
    """Enqueue a trial with these settings, the others as in `base`; return notices about it.

    It is checked as `plan` checks a file. `again`: a trial with these settings is trained once more, with another seed.

    Raises:
        SpecError: with all invalid settings.
        DataError: there are fewer pairs than one update takes.
        RequestRefused: no setting is given, or a trial has these settings already.
    """
    folder = existing_sweep(root, name)
    with open_study(folder) as study:
        params = _params_of(overrides)
        _check(study.spec, overrides, params)
        if not params:
            raise RequestRefused("name the settings of the trial: --set loss.beta=3 --set loss.gamma=1")
        params, warnings = check_like_plan(study.spec, root, params, options_of(overrides))
        equal = equal_trial(study, params)
        if again:
            if equal is None:
                raise RequestRefused(f"no trial of {name} has these settings: enqueue it without --again")
            params = with_another_seed(study, equal)
        else:
            _refuse_repetition(study, params, equal)
        origin = f"enqueued by {current_user()}" if equal is None or not again else _again_text(equal.number)
        study.enqueue(params, origin, kind="enqueued")
        notices = [f"enqueued a trial with {_format_params(params)}: it runs next, in addition to budget.trials"]
        if again and study.terms.distinct:  # the sampler learns from the mean of the seeds
            params = {path: value for path, value in params.items() if path != SEED}
        return [
            *notices,
            *warnings,
            *_out_of_space_notice(study.spec, params),
            *when_applied(name, folders.driver_of(folder) is not None),
        ]


def _again_text(number: int) -> str:
    return f"trial {number} again with another seed, enqueued by {current_user()}"


def _refuse_repetition(study: StudyReader, params: Mapping[str, Any], equal: TrialRecord | None) -> None:
    """Raise RequestRefused if the trial would repeat one that was issued or waits, with the same seed."""
    if equal is None and not waits_already(study, params):
        return
    what = "a waiting trial" if equal is None else f"trial {equal.number} ({equal.state})"
    hint = "it is trained once" if equal is None else "`orchestrate enqueue` with --again trains it with another seed"
    raise RequestRefused(f"{what} of {study.folder.name} has these settings and this seed already; {hint}")


def enqueue_clone(
    name: str, root: Path, trial: int, overrides: Sequence[str], reason: str = "", *, from_checkpoint: bool = False
) -> list[str]:
    """Enqueue a copy of a trial with these settings changed; return notices about it.

    The clone starts from the initial model, or with `from_checkpoint` from the trial's newest checkpoint.

    Raises:
        SpecError: with all invalid settings.
        RequestRefused: nothing is changed though the trial has not failed, there is no such trial, or no usable
            checkpoint.
    """
    folder = existing_sweep(root, name)
    with open_study(folder) as study:
        parent, base = record_of(study, trial), study.spec.base
        changed = _params_of(overrides)
        params = _clone_params(parent.params, changed)
        _check(study.spec, overrides, params)
        params, warnings = check_like_plan(study.spec, root, params, options_of(overrides))
        before, after = apply_params(base, parent.params), apply_params(base, params)
        repeats_failed = parent.state is TrialState.FAILED and not from_checkpoint
        if before.canonical_params() == after.canonical_params() and not repeats_failed:
            raise RequestRefused(f"a clone of trial {trial} without changes repeats it; change a setting with --set")
        if not from_checkpoint:
            _refuse_repetition(study, params, equal_trial(study, params))
        from_checkpoint_text = ""
        fork = None
        with ExitStack() as stack:
            if from_checkpoint:
                _raise_problems(overrides, check_fork(before, after, changed))
                fork = stack.enter_context(pinned_checkpoint(study, parent, after))
                from_checkpoint_text = f" from its checkpoint of update {fork.step}"
            with_changes = f"with {_format_params(changed)}" if changed else "without changes"
            description = f"clone of trial {trial}{from_checkpoint_text} {with_changes}"
            origin = f"{description}, by {current_user()}" + (f": {reason}" if reason else "")
            study.enqueue(params, origin, kind="cloned", parent=trial, fork=fork)
        notices = [f"enqueued a {description}: it runs next, in addition to budget.trials"]
        if fork is not None:
            notices.append("the sampler ignores its result, which depends on two configurations")
        else:
            notices += _out_of_space_notice(study.spec, params)
        return [*notices, *warnings, *when_applied(name, folders.driver_of(folder) is not None)]


def _clone_params(parent: Mapping[str, Any], changed: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parent's settings with the changes; another `loss.kind` uses its own defaults."""
    other_loss = changed.get(LOSS_KIND, parent.get(LOSS_KIND)) != parent.get(LOSS_KIND)
    inherited = {
        p: v
        for p, v in parent.items()
        if EQUIVALENT_PATHS.get(p) not in changed and not (other_loss and p.startswith("loss."))
    }
    return {**inherited, **changed}


def _params_of(overrides: Sequence[str]) -> dict[str, Any]:
    """Return the settings of the `--set` options as a trial has them. Raises SpecError."""
    given = expand_options(dict(parse_overrides(overrides)), options_of(overrides))
    return {path: list_as_text(path, value) for path, value in given.items()}


def _check(spec: SweepSpec, overrides: Sequence[str], params: Mapping[str, Any]) -> None:
    _raise_problems(overrides, check_manual_trial(spec.base, spec.search, spec.first_objective, params), spec.search)


def _raise_problems(overrides: Sequence[str], found: Iterable[SpecProblem], search: SearchSpace | None = None) -> None:
    """Raise SpecError with all problems, each at its `--set` option, if there are any."""
    flags = {one.partition("=")[0].strip().removeprefix("base."): one for one in overrides}
    problems: list[SpecProblem] = []
    for problem in found:
        sampled = "" if search is None else allowed_values(search, problem.path)
        if problem.path in flags and problem.path not in config_paths():
            value = flags[problem.path].partition("=")[2]
            problem = replace(problem, hint=option_form(problem.path, value) or problem.hint)
        hints = [h for h in (problem.hint, f"the search has {sampled}" if sampled else "") if h]
        where = f"--set {flags[problem.path]}" if problem.path in flags else "--set"
        problems.append(replace(problem, where=where, hint="; ".join(hints)))
    if problems:
        raise SpecError(problems)


def _out_of_space_notice(spec: SweepSpec, params: Mapping[str, Any]) -> list[str]:
    """Return a notice about settings outside the search space, whose results the sampler ignores."""
    resolved = resolve_params(spec.base, spec.search, params)
    outside = out_of_space(spec.search, resolved)
    if not outside:
        return []
    of_base = {path: f" = {short_value(resolved[path])} of the base" for path in outside if path not in params}
    reasons = ", ".join(
        f"{path}{of_base.get(path, '')} ({allowed_values(spec.search, path) or 'not searched'})" for path in outside
    )
    staged = isinstance(spec.sampler, StagedSampler)
    then = "and later stages start from the best trial" if staged else "but the sampler ignores its result"
    return [f"outside the search space: {clause(reasons)}; it can win, {then}"]


def _format_params(params: Mapping[str, Any]) -> str:
    return ", ".join(f"{path}={value}" for path, value in params.items())
