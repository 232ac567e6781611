"""Trials that people give a sweep: checked here and now, queued in the study, run next."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from orchestrator.commands.forking import held_checkpoint
from orchestrator.commands.hands import CannotDo, later, open_study, record_of, who
from orchestrator.driving import lock
from orchestrator.errors import Finding, SpecError
from orchestrator.folders import existing
from orchestrator.spec.document import parse
from orchestrator.spec.forking import fork_problems
from orchestrator.spec.given import Problem, outside, params_of, problems, valid
from orchestrator.spec.place import KIND, TWINS, place
from orchestrator.spec.space import SearchSpace
from orchestrator.spec.sweep import SweepSpec


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
        return [*said, *_beyond(study.spec, leaves), *later(name, lock.holder(folder) is not None)]


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
        return [*said, *later(name, lock.holder(folder) is not None)]


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
