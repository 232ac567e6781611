"""Loads `search:` into a SearchSpace, and `enqueue:` into trials that run first.

An enqueued trial is a mapping of settings to values; its other settings are those of `base`.
"""

from __future__ import annotations

from typing import Any, cast

from orchestrator.errors import SpecProblem, closest_match
from orchestrator.spec.loading.range_forms import fraction_problem, range_form
from orchestrator.spec.loading.validation_errors import UNKNOWN_KEY, ErrorCollector, describe_value, value_problem
from orchestrator.spec.objectives import Objective
from orchestrator.spec.search.dimensions import DIMENSION_KINDS, Dimension, Scalar
from orchestrator.spec.search.manual_trials import check_manual_trial
from orchestrator.spec.search.space import SearchSpace
from orchestrator.spec.search.trial_params import apply_params, config_paths, list_as_text, list_paths, read_list
from trainer.config.loss_aliases import alias_hint
from trainer.config.loss_config import SimpoLoss
from trainer.config.trial import TrialConfig
from trainer.config.yaml_files import Location

SEARCH = "search"
MARGIN_PATHS = {"loss.gamma", "loss.gamma_beta_ratio"}


def load_search(problems: ErrorCollector, value: Any) -> SearchSpace | None:
    """Load `search`; None if it is invalid."""
    if value is None:
        return SearchSpace()
    if not isinstance(value, dict):
        problems.add((SEARCH,), f"must be a mapping from settings to their values, not {describe_value(value)}")
        return None
    before = len(problems.items)
    dimensions: dict[str, Dimension] = {}
    zipped: tuple[dict[str, tuple[Scalar, ...]], ...] = ()
    for path, entry in cast(dict[str, Any], value).items():
        if path == "zip":
            zipped = _load_zip(problems, entry)
        elif not _check_path(problems, (SEARCH, path), path):
            continue
        elif (dimension := _load_dimension(problems, (SEARCH, path), entry)) is not None:
            dimensions[path] = dimension
    if len(problems.items) > before:
        if value.keys() >= MARGIN_PATHS:
            problems.add((SEARCH, "loss.gamma_beta_ratio"), SearchSpace.TWICE)
        return None
    # Constructed without validation first, so that each problem is reported with its own line of the file.
    for path, problem in SearchSpace.model_construct(dimensions=dimensions, zipped=zipped).find_problems():
        problems.add(location_of(zipped, path), problem)
    return SearchSpace(dimensions=dimensions, zipped=zipped) if len(problems.items) == before else None


def location_of(zipped: tuple[dict[str, tuple[Scalar, ...]], ...], path: str) -> Location:
    """Return the location in the file of a searched setting's values."""
    group = next((g for g, paths in enumerate(zipped) if path in paths), None)
    return (SEARCH, path) if group is None else (SEARCH, "zip", group, path)


def _load_dimension(problems: ErrorCollector, loc: Location, entry: Any) -> Dimension | None:
    path = str(loc[-1])
    if isinstance(entry, tuple):
        entry = _with_list_texts(path, entry)
        if not _check_scalars(problems, loc, cast(tuple[Any, ...], entry)):
            return None
        return problems.validate(DIMENSION_KINDS["choice"], {"choice": entry}, loc, lambda inner: inner[1:])
    if not isinstance(entry, dict):
        hint = range_form(path, entry) or f"for one value: [{entry}]"
        problems.add(loc, f"must be a list of values or a range, not {describe_value(entry)}", hint)
        return None
    body = cast(dict[str, Any], entry)
    kinds = [kind for kind in DIMENSION_KINDS if kind in body]
    if len(kinds) != 1:
        has = f"it has {', '.join(kinds or body) or 'none'}"
        hint = "" if kinds else range_form(path, body)
        problems.add(loc, f"needs exactly one of {', '.join(DIMENSION_KINDS)}", f"{has}; {hint}" if hint else has)
        return None
    listed = _with_list_texts(path, body.get("choice"))
    body = body | ({"choice": listed} if "choice" in body else {})
    if isinstance(listed, tuple) and not _check_scalars(problems, (*loc, "choice"), cast(tuple[Any, ...], listed)):
        return None
    dimension = problems.validate(DIMENSION_KINDS[kinds[0]], body, loc)
    problem = fraction_problem(path, dimension) if dimension is not None and problems.is_new else None
    if problem is not None:
        problems.add(loc, *problem)
        return None
    return dimension


def check_values(problems: ErrorCollector, given: Any) -> None:
    """Report values of `search` that no trial can have, each on its own; for files without a valid base.

    With one, every corner is checked as a whole trial instead.
    """
    reported = {finding.path for finding in problems.items}
    for path, entry in cast(dict[str, Any], given).items() if isinstance(given, dict) else ():
        fields = config_paths().get(path)
        listed = cast(dict[str, Any], entry).get("choice") if isinstance(entry, dict) else entry
        if fields is None or not isinstance(listed, tuple) or ".".join((SEARCH, path)) in reported:
            continue
        inner = ("choice",) if isinstance(entry, dict) else ()
        for i, value in enumerate(cast(tuple[Any, ...], listed)):
            loc = (SEARCH, path, *inner, i)
            given_value = read_list(path, list_as_text(path, value))
            if ".".join(map(str, loc)) not in reported and (problem := value_problem(fields, given_value)) is not None:
                problems.add(loc, *problem)


def _load_zip(problems: ErrorCollector, entry: Any) -> tuple[dict[str, tuple[Scalar, ...]], ...]:
    groups = cast(tuple[Any, ...], entry) if isinstance(entry, tuple) else (entry,)
    out: list[dict[str, tuple[Scalar, ...]]] = []
    for index, group in enumerate(groups):
        loc: Location = (SEARCH, "zip", index)
        if not isinstance(group, dict) or not group:
            problems.add(loc, f"must be a mapping from settings to lists of equal length, not {describe_value(group)}")
            continue
        group = cast(dict[str, Any], group)
        for path, listed in list(group.items()):
            _check_path(problems, (*loc, path), path)
            group[path] = listed = _with_list_texts(path, listed)
            if not isinstance(listed, tuple) or not listed:
                problems.add((*loc, path), f"must be a list of values, not {describe_value(listed)}")
            else:
                _check_scalars(problems, (*loc, path), cast(tuple[Any, ...], listed))
        out.append(cast(dict[str, tuple[Scalar, ...]], group))
    return tuple(out)


def _with_list_texts(path: str, listed: Any) -> Any:
    """Return the values with each list as the text that stands for it."""
    if not isinstance(listed, tuple):
        return listed
    return tuple(list_as_text(path, value) for value in cast(tuple[Any, ...], listed))


def _check_path(problems: ErrorCollector, loc: Location, path: str) -> bool:
    if path in config_paths():
        return True
    under = [known_path for known_path in config_paths() if known_path.startswith(f"{path}.")]
    if path in list_paths():
        problems.add(loc, "is a list, which cannot be searched")
    elif under:
        problems.add(loc, "is a group of settings, not a setting", "its settings: " + ", ".join(under))
    else:
        near = closest_match(path, config_paths())
        form = problems.form(UNKNOWN_KEY, loc)
        hint = alias_hint(path.removeprefix("loss."), _loss_kind(problems)) if path.startswith("loss.") else ""
        problems.add(
            loc, "there is no such setting in a trial", hint or form or (f"did you mean {near}?" if near else "")
        )
    return False


def _loss_kind(problems: ErrorCollector) -> str:
    """Return the loss.kind of the file's base, or the default if the file is invalid there."""
    found: Any = problems.document.value
    for key in ("base", "loss", "kind"):
        found = cast(dict[str, Any], found).get(key) if isinstance(found, dict) else None
    return found if isinstance(found, str) else SimpoLoss().kind


def _check_scalars(problems: ErrorCollector, loc: Location, listed: tuple[Any, ...]) -> bool:
    if not listed:
        problems.add(loc, "the list is empty")
    bad = [index for index, value in enumerate(listed) if isinstance(value, (tuple, dict))]
    for index in bad:
        problems.add(
            (*loc, index),
            f"a searched value is a number, text, true, false or null, not {describe_value(listed[index])}",
        )
    return bool(listed) and not bad


ENQUEUE = "enqueue"


def load_enqueue(
    problems: ErrorCollector, given: Any, search: SearchSpace, base: TrialConfig, objectives: tuple[Objective, ...]
) -> tuple[dict[str, Scalar], ...] | None:
    """Load `enqueue`: valid trials in order, whose values may be outside of the search space. None if invalid."""
    if given is None:
        return ()
    if not isinstance(given, tuple):
        problems.add((ENQUEUE,), f"must be a list of mappings from settings to values, not {describe_value(given)}")
        return None
    before = len(problems.items)
    out: list[dict[str, Scalar]] = []
    seen: list[Any] = []
    for index, one in enumerate(cast(tuple[Any, ...], given)):
        loc: Location = (ENQUEUE, index)
        if not isinstance(one, dict) or not one:
            problems.add(loc, f"must be a mapping from settings to values, not {describe_value(one)}")
            continue
        params = {path: list_as_text(path, value) for path, value in cast(dict[str, Any], one).items()}
        wrong = [
            SpecProblem("", path, f"one trial has one value, not {describe_value(value)}")
            for path, value in params.items()
            if _is_collection(value)
        ]
        for objective in () if wrong else objectives:
            wrong += [
                problem for problem in check_manual_trial(base, search, objective, params) if problem not in wrong
            ]
        for found in wrong:
            problems.add((*loc, found.path), found.problem, found.hint)
        if wrong:
            continue
        identity = apply_params(base, params).canonical_params()
        if identity in seen:
            problems.add(loc, f"equals entry {seen.index(identity)}")
        seen.append(identity)
        out.append(params)
    return tuple(out) if len(problems.items) == before else None


def _is_collection(value: Any) -> bool:
    return isinstance(value, tuple | dict)
