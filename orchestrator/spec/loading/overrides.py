"""`--set a.b=c` replaces one setting of the file; errors name the flag instead of a line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from orchestrator.errors import SpecError, SpecProblem, closest_match
from orchestrator.spec.loading.shorthands import expand_shorthands
from orchestrator.spec.loading.validation_errors import parse_document
from orchestrator.spec.search.dimensions import DIMENSION_KINDS, values_equal
from orchestrator.spec.search.trial_params import EQUIVALENT_PATHS, LOSS_KIND
from orchestrator.spec.sweep_spec import SECTION_ORDER
from trainer.config.trial import TrialConfig
from trainer.config.yaml_files import Document, Location

_SECTIONS = tuple(TrialConfig.model_fields)
_DIMENSION_KEYS = {*DIMENSION_KINDS, "step", "log", "when"}


def apply_overrides(document: Document, sets: Sequence[str], problems: list[SpecProblem]) -> list[str]:
    """Apply each `PATH=VALUE` to the document; return notices of what else changed. Errors are added to `findings`."""
    notices: list[str] = []
    given: list[tuple[str, str, Any]] = []
    for one in sets:
        flag = f"--set {one}"
        path, equals, text = one.partition("=")
        path = path.strip()
        if not equals or not path:
            problems.append(SpecProblem(flag, "", "must be PATH=VALUE, such as loss.beta=2.5"))
            continue
        first = path.partition(".")[0]
        if first not in _SECTIONS and first not in SECTION_ORDER:
            near = closest_match(first, [*_SECTIONS, *SECTION_ORDER])
            problems.append(SpecProblem(flag, path, "unknown key", f"did you mean {near}?" if near else ""))
            continue
        try:
            given.append((flag, path, parse_document(text, flag).value if text.strip() else None))
        except SpecError as error:
            problems += [SpecProblem(flag, path, f.problem, f.hint) for f in error.problems]
    fresh = {path for _, path, _ in given}
    for flag, path, value in given:
        try:
            notices += _apply_override(document, flag, path, value, fresh)
        except SpecError as error:
            problems += error.problems
    return notices


def _apply_override(document: Document, flag: str, path: str, value: Any, fresh: set[str]) -> list[str]:
    if path.partition(".")[0] not in _SECTIONS:
        _replace_objective(document, path)
        loc = _file_location(path)
        if value is None and loc[0] == "search" and len(loc) == 2:
            _remove_from_search(document, str(loc[1]))
        else:
            _set(document, flag, loc, value)
        return []
    notices = [f"{flag}: {path} was searched and is now fixed"] if _fix_value(document, path, value) else []
    if path == LOSS_KIND:
        notices += _replace_loss(document, flag, value, fresh)
    equivalent = EQUIVALENT_PATHS.get(path)
    if (
        equivalent is not None
        and equivalent not in fresh
        and _get(document.value, ("base", *equivalent.split("."))) is not None
    ):
        notices.append(f"{flag}: replaces {equivalent}, which sets the same margin")
        _set(document, flag, ("base", *equivalent.split(".")), None)
    _set(document, flag, ("base", *(int(p) if p.isdigit() else p for p in path.split("."))), value)
    return notices


def _remove_from_search(document: Document, path: str) -> None:
    """`search.PATH=null`: the setting is no longer searched and has its value in `base`."""
    search = _get(document.value, ("search",))
    if isinstance(search, dict):
        cast(dict[str, Any], search).pop(path, None)


def _replace_objective(document: Document, path: str) -> None:
    """`maximize` removes `minimize` and the reverse."""
    other = {"maximize": "minimize", "minimize": "maximize"}.get(path)
    if other is not None and isinstance(document.value, dict):
        document.value.pop(other, None)


def _replace_loss(document: Document, flag: str, kind: Any, fresh: set[str]) -> list[str]:
    """Another kind of loss starts from its own defaults, as when loss.kind is searched."""
    loss = _get(document.value, ("base", "loss"))
    if not isinstance(loss, dict) or loss.get("kind") == kind:
        return []
    removed = [key for key in cast(dict[str, Any], loss) if key != "kind" and f"loss.{key}" not in fresh]
    for key in removed:
        del loss[key]
    return [f"{flag}: the file's loss.{key} belonged to the other loss and is left out" for key in removed]


def _fix_value(document: Document, path: str, value: Any) -> bool:
    """Remove a setting from `search` and resolve the conditions that name it."""
    search = _get(document.value, ("search",))
    if not isinstance(search, dict) or path not in search:
        return False
    dimensions = cast(dict[str, Any], search)
    del dimensions[path]
    for other, dimension in list(dimensions.items()):
        when = dimension.get("when") if isinstance(dimension, dict) else None
        if not isinstance(when, dict) or path not in when:
            continue
        allowed = when.pop(path)
        if not any(values_equal(value, v) for v in (allowed if isinstance(allowed, tuple) else (allowed,))):
            del dimensions[other]
    return True


def _file_location(path: str) -> Location:
    """Return the location in the file: below `search` a setting's dotted path is one key."""
    first, _, rest = path.partition(".")
    if first != "search" or not rest:
        return tuple(int(p) if p.isdigit() else p for p in path.split("."))
    name, _, last = rest.rpartition(".")
    return ("search", name, last) if name and last in _DIMENSION_KEYS else ("search", rest)


def _get(tree: Any, loc: Location) -> Any:
    for part in loc:
        if not isinstance(tree, Mapping):
            return None
        tree = cast(Mapping[Any, Any], tree).get(part)
    return tree


def _set(document: Document, flag: str, loc: Location, value: Any) -> None:
    document.lines = {known: at for known, at in document.lines.items() if known[: len(loc)] != loc}
    document.lines[loc] = flag
    try:
        document.value = _with_value(document.value, loc, value)
        expand_shorthands(document.value)
    except IndexError as error:
        raise SpecError([SpecProblem(flag, ".".join(map(str, loc)), str(error))]) from None


def _with_value(tree: Any, loc: Location, value: Any) -> Any:
    if not loc:
        return value
    part, rest = loc[0], loc[1:]
    if isinstance(tree, tuple):
        items = list(cast(tuple[Any, ...], tree))
        if not isinstance(part, int) or part >= len(items):
            raise IndexError(f"a list of {len(items)} has no entry {part} (the first is 0)")
        items[part] = _with_value(items[part], rest, value)
        return tuple(items)
    # A group that is absent, or a shorthand in its place, becomes a mapping with this one setting.
    group: dict[str, Any] = cast(dict[str, Any], tree) if isinstance(tree, dict) else {}
    group[str(part)] = _with_value(group.get(str(part)), rest, value)
    return group
