"""Loads `search:` into a SearchSpace, and `enqueue:` into trials that run first.

An enqueued trial is a mapping of settings to values; its other settings are those of `base`.
"""

from __future__ import annotations

from typing import Any, cast

from orchestrator.errors import SpecProblem, closest_match
from orchestrator.spec.loading.validation_errors import ErrorCollector, format_value
from orchestrator.spec.objectives import Objective
from orchestrator.spec.search.dimensions import DIMENSION_KINDS, Dimension, Scalar
from orchestrator.spec.search.manual_trials import check_manual_trial
from orchestrator.spec.search.space import SearchSpace
from orchestrator.spec.search.trial_params import apply_params, config_paths, list_paths
from trainer.config.loss_config import SimpoLoss, alias_hint
from trainer.config.trial import TrialConfig
from trainer.config.yaml_files import Location

SEARCH = "search"
MARGIN_PATHS = {"loss.gamma", "loss.gamma_beta_ratio"}


def load_search(findings: ErrorCollector, value: Any) -> SearchSpace | None:
    """Load `search`; None if it is invalid."""
    if value is None:
        return SearchSpace()
    if not isinstance(value, dict):
        findings.add((SEARCH,), f"must be a mapping from settings to their values, not {format_value(value)}")
        return None
    before = len(findings.items)
    dimensions: dict[str, Dimension] = {}
    zipped: tuple[dict[str, tuple[Scalar, ...]], ...] = ()
    for path, entry in cast(dict[str, Any], value).items():
        if path == "zip":
            zipped = _load_zip(findings, entry)
        elif not _check_path(findings, (SEARCH, path), path):
            continue
        elif (dimension := _load_dimension(findings, (SEARCH, path), entry)) is not None:
            dimensions[path] = dimension
    if len(findings.items) > before:
        if value.keys() >= MARGIN_PATHS:
            findings.add((SEARCH, "loss.gamma_beta_ratio"), SearchSpace.TWICE)
        return None
    # Constructed without validation first, so that each problem is reported with its own line of the file.
    for path, problem in SearchSpace.model_construct(dimensions=dimensions, zipped=zipped).find_problems():
        findings.add(location_of(zipped, path), problem)
    return SearchSpace(dimensions=dimensions, zipped=zipped) if len(findings.items) == before else None


def location_of(zipped: tuple[dict[str, tuple[Scalar, ...]], ...], path: str) -> Location:
    """Return the location in the file of a searched setting's values."""
    group = next((g for g, paths in enumerate(zipped) if path in paths), None)
    return (SEARCH, path) if group is None else (SEARCH, "zip", group, path)


def _load_dimension(findings: ErrorCollector, loc: Location, entry: Any) -> Dimension | None:
    if isinstance(entry, tuple):
        if not _check_scalars(findings, loc, cast(tuple[Any, ...], entry)):
            return None
        return findings.validate(DIMENSION_KINDS["choice"], {"choice": entry}, loc, lambda inner: inner[1:])
    if not isinstance(entry, dict):
        findings.add(
            loc, f"must be a list of values or a range, not {format_value(entry)}", f"for one value: [{entry}]"
        )
        return None
    body = cast(dict[str, Any], entry)
    kinds = [kind for kind in DIMENSION_KINDS if kind in body]
    if len(kinds) != 1:
        findings.add(
            loc, f"needs exactly one of {', '.join(DIMENSION_KINDS)}", f"it has {', '.join(kinds or body) or 'none'}"
        )
        return None
    listed = body.get("choice")
    if isinstance(listed, tuple) and not _check_scalars(findings, (*loc, "choice"), cast(tuple[Any, ...], listed)):
        return None
    return findings.validate(DIMENSION_KINDS[kinds[0]], body, loc)


def _load_zip(findings: ErrorCollector, entry: Any) -> tuple[dict[str, tuple[Scalar, ...]], ...]:
    groups = cast(tuple[Any, ...], entry) if isinstance(entry, tuple) else (entry,)
    out: list[dict[str, tuple[Scalar, ...]]] = []
    for index, group in enumerate(groups):
        loc: Location = (SEARCH, "zip", index)
        if not isinstance(group, dict) or not group:
            findings.add(loc, f"must be a mapping from settings to lists of equal length, not {format_value(group)}")
            continue
        for path, listed in cast(dict[str, Any], group).items():
            _check_path(findings, (*loc, path), path)
            if not isinstance(listed, tuple) or not listed:
                findings.add((*loc, path), f"must be a list of values, not {format_value(listed)}")
            else:
                _check_scalars(findings, (*loc, path), cast(tuple[Any, ...], listed))
        out.append(cast(dict[str, tuple[Scalar, ...]], group))
    return tuple(out)


def _check_path(findings: ErrorCollector, loc: Location, path: str) -> bool:
    if path in config_paths():
        return True
    under = [known_path for known_path in config_paths() if known_path.startswith(f"{path}.")]
    if path in list_paths():
        findings.add(loc, "is a list, which cannot be searched")
    elif under:
        findings.add(loc, "is a group of settings, not a setting", "its settings: " + ", ".join(under))
    else:
        near = closest_match(path, config_paths())
        hint = alias_hint(path.removeprefix("loss."), _loss_kind(findings)) if path.startswith("loss.") else ""
        findings.add(loc, "there is no such setting in a trial", hint or (f"did you mean {near}?" if near else ""))
    return False


def _loss_kind(findings: ErrorCollector) -> str:
    """Return the loss.kind of the file's base, or the default if the file is invalid there."""
    found: Any = findings.document.value
    for key in ("base", "loss", "kind"):
        found = cast(dict[str, Any], found).get(key) if isinstance(found, dict) else None
    return found if isinstance(found, str) else SimpoLoss().kind


def _check_scalars(findings: ErrorCollector, loc: Location, listed: tuple[Any, ...]) -> bool:
    if not listed:
        findings.add(loc, "the list is empty")
    bad = [index for index, value in enumerate(listed) if isinstance(value, (tuple, dict))]
    for index in bad:
        findings.add(
            (*loc, index), f"a searched value is a number, text, true, false or null, not {format_value(listed[index])}"
        )
    return bool(listed) and not bad


ENQUEUE = "enqueue"


def load_enqueue(
    findings: ErrorCollector, given: Any, search: SearchSpace, base: TrialConfig, objectives: tuple[Objective, ...]
) -> tuple[dict[str, Scalar], ...] | None:
    """Load `enqueue`: valid trials in order, whose values may be outside of the search space. None if invalid."""
    if given is None:
        return ()
    if not isinstance(given, tuple):
        findings.add((ENQUEUE,), f"must be a list of mappings from settings to values, not {format_value(given)}")
        return None
    before = len(findings.items)
    out: list[dict[str, Scalar]] = []
    seen: list[Any] = []
    for index, one in enumerate(cast(tuple[Any, ...], given)):
        loc: Location = (ENQUEUE, index)
        if not isinstance(one, dict) or not one:
            findings.add(loc, f"must be a mapping from settings to values, not {format_value(one)}")
            continue
        params = cast(dict[str, Any], one)
        wrong = [
            SpecProblem("", path, f"one trial has one value, not {format_value(value)}")
            for path, value in params.items()
            if _is_collection(value)
        ]
        for objective in () if wrong else objectives:
            wrong += [
                problem for problem in check_manual_trial(base, search, objective, params) if problem not in wrong
            ]
        for found in wrong:
            findings.add((*loc, found.path), found.problem, found.hint)
        if wrong:
            continue
        identity = apply_params(base, params).canonical_params()
        if identity in seen:
            findings.add(loc, f"equals entry {seen.index(identity)}")
        seen.append(identity)
        out.append(params)
    return tuple(out) if len(findings.items) == before else None


def _is_collection(value: Any) -> bool:
    return isinstance(value, tuple | dict)
