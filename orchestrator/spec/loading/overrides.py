"""The `--set a.b=c` options: parsed, and applied to a sweep file; errors name the option instead of a line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from orchestrator.errors import SpecError, SpecProblem, closest_match
from orchestrator.spec.loading.right_forms import option_form
from orchestrator.spec.loading.shorthands import expand_shorthands
from orchestrator.spec.loading.validation_errors import NONE_PROBLEM, UNKNOWN_KEY, parse_document
from orchestrator.spec.search.dimensions import DIMENSION_KINDS, values_equal
from orchestrator.spec.search.trial_params import EQUIVALENT_PATHS, LOSS_KIND
from orchestrator.spec.sweep_spec import SECTION_ORDER
from trainer.config.trial import TrialConfig
from trainer.config.yaml_files import Document, Location

_SECTIONS = tuple(TrialConfig.model_fields)
_EXAMPLE = "loss.beta=2.5"
_DIMENSION_KEYS = {*DIMENSION_KINDS, "step", "log", "when"}


def parse_overrides(overrides: Sequence[str], example: str = _EXAMPLE) -> list[tuple[str, Any]]:
    """Return the path, without `base.`, and the value of each `PATH=VALUE`. Raises SpecError with all problems."""
    found: list[tuple[str, Any]] = []
    problems: list[SpecProblem] = []
    for one in overrides:
        try:
            path, text = _split(one, example)
            path = path.removeprefix("base.")
            parsed = _parse_value(one, path, text)
            found.append((path, None if parsed is None else parsed.value))
        except SpecError as error:
            problems += error.problems
    if problems:
        raise SpecError(problems)
    return found


def _split(option: str, example: str = _EXAMPLE) -> tuple[str, str]:
    path, equals, text = option.partition("=")
    if not equals or not path.strip():
        raise SpecError([SpecProblem(f"--set {option}", "", f"must be PATH=VALUE, such as {example}")])
    return path.strip(), text


def _parse_value(option: str, path: str, text: str) -> Document | None:
    """Parse the value of an option as YAML; None without a text. Raises SpecError with the option and the path."""
    flag = f"--set {option}"
    try:
        return parse_document(text, flag) if text.strip() else None
    except SpecError as error:
        raise SpecError([SpecProblem(flag, path, found.problem, found.hint) for found in error.problems]) from None


def apply_overrides(document: Document, overrides: Sequence[str], problems: list[SpecProblem]) -> list[str]:
    """Apply each `PATH=VALUE` to the document; return notices of what else changed. Errors are added to `problems`."""
    notices: list[str] = []
    given: list[tuple[str, str, Any]] = []
    for one in overrides:
        flag = f"--set {one}"
        try:
            path, text = _split(one)
            first = path.partition(".")[0]
            if first not in _SECTIONS and first not in SECTION_ORDER:
                near = closest_match(first, [*_SECTIONS, *SECTION_ORDER])
                hint = option_form(path, text) or (f"did you mean {near}?" if near else "")
                problems.append(SpecProblem(flag, path, UNKNOWN_KEY, hint))
                continue
            parsed = _parse_value(one, path, text)
            if parsed is not None and parsed.unquoted_none:
                problems.append(SpecProblem(flag, path, NONE_PROBLEM, f"write --set {path}=null"))
                continue
            given.append((flag, path, None if parsed is None else parsed.value))
        except SpecError as error:
            problems += error.problems
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
    document.shorthands = {at: short for at, short in document.shorthands.items() if at[: len(loc)] != loc}
    try:
        document.value = _with_value(document.value, loc, value)
        expand_shorthands(document)
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
