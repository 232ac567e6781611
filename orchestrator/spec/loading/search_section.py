"""The file's `search:` into a SearchSpace.

The file's `enqueue`: trials that run first, each a mapping of leaves to values; other leaves are as in `base`.
"""

from __future__ import annotations

from typing import Any, cast

from orchestrator.errors import nearest
from orchestrator.spec.loading.validation_errors import Findings, show
from orchestrator.spec.loading.yaml_document import Loc
from orchestrator.spec.objectives import Goal
from orchestrator.spec.search.dimensions import KINDS, Dimension, Scalar
from orchestrator.spec.search.manual_trials import problems
from orchestrator.spec.search.space import SearchSpace
from orchestrator.spec.search.trial_params import leaves, lists, place
from trainer.config.loss_config import SimpoLoss, meaning_of
from trainer.config.trial import TrialConfig

SEARCH = "search"
MARGINS = {"loss.gamma", "loss.gamma_beta_ratio"}


def build_search(findings: Findings, value: Any) -> SearchSpace | None:
    """The search space, or findings."""
    if value is None:
        return SearchSpace()
    if not isinstance(value, dict):
        findings.add((SEARCH,), f"must be a mapping from a leaf to its values, not {show(value)}")
        return None
    before = len(findings.items)
    dimensions: dict[str, Dimension] = {}
    zipped: tuple[dict[str, tuple[Scalar, ...]], ...] = ()
    for path, entry in cast(dict[str, Any], value).items():
        if path == "zip":
            zipped = _zip(findings, entry)
        elif not _is_leaf(findings, (SEARCH, path), path):
            continue
        elif (dimension := _dimension(findings, (SEARCH, path), entry)) is not None:
            dimensions[path] = dimension
    if len(findings.items) > before:
        if value.keys() >= MARGINS:
            findings.add((SEARCH, "loss.gamma_beta_ratio"), SearchSpace.TWICE)
        return None
    # Unchecked first, so that each thing without sense gets its own line of the file.
    for path, problem in SearchSpace.model_construct(dimensions=dimensions, zipped=zipped).unsound():
        findings.add(loc_of(zipped, path), problem)
    return SearchSpace(dimensions=dimensions, zipped=zipped) if len(findings.items) == before else None


def loc_of(zipped: tuple[dict[str, tuple[Scalar, ...]], ...], path: str) -> Loc:
    """Where the file says what is searched for this leaf."""
    group = next((g for g, paths in enumerate(zipped) if path in paths), None)
    return (SEARCH, path) if group is None else (SEARCH, "zip", group, path)


def _dimension(findings: Findings, loc: Loc, entry: Any) -> Dimension | None:
    if isinstance(entry, tuple):
        if not _scalars(findings, loc, cast(tuple[Any, ...], entry)):
            return None
        return findings.build(KINDS["choice"], {"choice": entry}, loc, lambda inner: inner[1:])
    if not isinstance(entry, dict):
        findings.add(loc, f"must be a list of values or a range, not {show(entry)}", f"for one value: [{entry}]")
        return None
    body = cast(dict[str, Any], entry)
    kinds = [kind for kind in KINDS if kind in body]
    if len(kinds) != 1:
        findings.add(loc, f"needs exactly one of {', '.join(KINDS)}", f"it has {', '.join(kinds or body) or 'none'}")
        return None
    listed = body.get("choice")
    if isinstance(listed, tuple) and not _scalars(findings, (*loc, "choice"), cast(tuple[Any, ...], listed)):
        return None
    return findings.build(KINDS[kinds[0]], body, loc)


def _zip(findings: Findings, entry: Any) -> tuple[dict[str, tuple[Scalar, ...]], ...]:
    groups = cast(tuple[Any, ...], entry) if isinstance(entry, tuple) else (entry,)
    out: list[dict[str, tuple[Scalar, ...]]] = []
    for g, group in enumerate(groups):
        loc: Loc = (SEARCH, "zip", g)
        if not isinstance(group, dict) or not group:
            findings.add(loc, f"must be a mapping from leaves to lists of equal length, not {show(group)}")
            continue
        for path, listed in cast(dict[str, Any], group).items():
            _is_leaf(findings, (*loc, path), path)
            if not isinstance(listed, tuple) or not listed:
                findings.add((*loc, path), f"must be a list of values, not {show(listed)}")
            else:
                _scalars(findings, (*loc, path), cast(tuple[Any, ...], listed))
        out.append(cast(dict[str, tuple[Scalar, ...]], group))
    return tuple(out)


def _is_leaf(findings: Findings, loc: Loc, path: str) -> bool:
    if path in leaves():
        return True
    under = [leaf for leaf in leaves() if leaf.startswith(f"{path}.")]
    if path in lists():
        findings.add(loc, "holds a list, which cannot be searched")
    elif under:
        findings.add(loc, "is a group of leaves, not a leaf", "its leaves: " + ", ".join(under))
    else:
        near = nearest(path, leaves())
        hint = meaning_of(path.removeprefix("loss."), _kind(findings)) if path.startswith("loss.") else ""
        findings.add(loc, "there is no such leaf in a trial", hint or (f"did you mean {near}?" if near else ""))
    return False


def _kind(findings: Findings) -> str:
    """The kind of loss that the file's base has, as far as it can be told."""
    found: Any = findings.document.value
    for key in ("base", "loss", "kind"):
        found = cast(dict[str, Any], found).get(key) if isinstance(found, dict) else None
    return found if isinstance(found, str) else SimpoLoss().kind


def _scalars(findings: Findings, loc: Loc, listed: tuple[Any, ...]) -> bool:
    if not listed:
        findings.add(loc, "the list is empty")
    bad = [i for i, value in enumerate(listed) if isinstance(value, (tuple, dict))]
    for i in bad:
        findings.add((*loc, i), f"a searched value is a number, text, true, false or null, not {show(listed[i])}")
    return bool(listed) and not bad


KEY = "enqueue"


def build_enqueue(
    findings: Findings, given: Any, search: SearchSpace, base: TrialConfig, goals: tuple[Goal, ...]
) -> tuple[dict[str, Scalar], ...] | None:
    """The given trials, in order; each is a legal trial, though its values may lie outside what is searched."""
    if given is None:
        return ()
    if not isinstance(given, tuple):
        findings.add((KEY,), f"must be a list of mappings from leaves to values, not {show(given)}")
        return None
    before = len(findings.items)
    out: list[dict[str, Scalar]] = []
    seen: list[Any] = []
    for i, one in enumerate(cast(tuple[Any, ...], given)):
        loc: Loc = (KEY, i)
        if not isinstance(one, dict) or not one:
            findings.add(loc, f"must be a mapping from leaves to values, not {show(one)}")
            continue
        leaves = cast(dict[str, Any], one)
        wrong = [(p, f"one trial has one value, not {show(v)}", "") for p, v in leaves.items() if _several(v)]
        for goal in () if wrong else goals:
            wrong += [problem for problem in problems(base, search, goal, leaves) if problem not in wrong]
        for path, problem, hint in wrong:
            findings.add((*loc, path), problem, hint)
        if wrong:
            continue
        identity = place(base, leaves).identity()
        if identity in seen:
            findings.add(loc, f"equals entry {seen.index(identity)}")
        seen.append(identity)
        out.append(leaves)
    return tuple(out) if len(findings.items) == before else None


def _several(value: Any) -> bool:
    return isinstance(value, tuple | dict)
