"""`--set a.b=c`: one leaf of the file, replaced; its errors point to the flag."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from orchestrator.errors import Finding, SpecError, nearest
from orchestrator.spec.loading.yaml_document import Document, Loc, parse
from orchestrator.spec.search.dimensions import KINDS, same
from orchestrator.spec.search.trial_params import KIND, TWINS
from orchestrator.spec.sweep_spec import DOOR
from trainer.config.trial import TrialConfig

_SECTIONS = tuple(TrialConfig.model_fields)
_DIMENSION_KEYS = {*KINDS, "step", "log", "when"}


def override(document: Document, sets: Sequence[str], findings: list[Finding]) -> list[str]:
    """Apply `PATH=VALUE` to the document; returns what else changed, in words. What is wrong goes to `findings`."""
    notices: list[str] = []
    given: list[tuple[str, str, Any]] = []
    for one in sets:
        flag = f"--set {one}"
        path, equals, text = one.partition("=")
        path = path.strip()
        if not equals or not path:
            findings.append(Finding(flag, "", "must be PATH=VALUE, such as loss.beta=2.5"))
            continue
        first = path.partition(".")[0]
        if first not in _SECTIONS and first not in DOOR:
            near = nearest(first, [*_SECTIONS, *DOOR])
            findings.append(Finding(flag, path, "unknown key", f"did you mean {near}?" if near else ""))
            continue
        try:
            given.append((flag, path, parse(text, flag).value if text.strip() else None))
        except SpecError as error:
            findings += [Finding(flag, path, f.problem, f.hint) for f in error.findings]
    fresh = {path for _, path, _ in given}
    for flag, path, value in given:
        try:
            notices += _apply(document, flag, path, value, fresh)
        except SpecError as error:
            findings += error.findings
    return notices


def _apply(document: Document, flag: str, path: str, value: Any, fresh: set[str]) -> list[str]:
    if path.partition(".")[0] not in _SECTIONS:
        _goal(document, path)
        loc = _door_loc(path)
        if value is None and loc[0] == "search" and len(loc) == 2:
            _unsearch(document, str(loc[1]))
        else:
            _write(document, flag, loc, value)
        return []
    notices = [f"{flag}: {path} was searched and is now fixed"] if _pin(document, path, value) else []
    if path == KIND:
        notices += _other_kind(document, flag, value, fresh)
    twin = TWINS.get(path)
    if twin is not None and twin not in fresh and _read(document.value, ("base", *twin.split("."))) is not None:
        notices.append(f"{flag}: replaces {twin}, which says the same")
        _write(document, flag, ("base", *twin.split(".")), None)
    _write(document, flag, ("base", *(int(p) if p.isdigit() else p for p in path.split("."))), value)
    return notices


def _unsearch(document: Document, path: str) -> None:
    """`search.PATH=null` searches this leaf no more; the base's value holds."""
    search = _read(document.value, ("search",))
    if isinstance(search, dict):
        cast(dict[str, Any], search).pop(path, None)


def _goal(document: Document, path: str) -> None:
    """One goal takes the place of the other."""
    other = {"maximize": "minimize", "minimize": "maximize"}.get(path)
    if other is not None and isinstance(document.value, dict):
        document.value.pop(other, None)


def _other_kind(document: Document, flag: str, kind: Any, fresh: set[str]) -> list[str]:
    """Another loss begins with its own defaults, as a drawn loss.kind does."""
    loss = _read(document.value, ("base", "loss"))
    if not isinstance(loss, dict) or loss.get("kind") == kind:
        return []
    left = [key for key in cast(dict[str, Any], loss) if key != "kind" and f"loss.{key}" not in fresh]
    for key in left:
        del loss[key]
    return [f"{flag}: the file's loss.{key} belonged to the other loss and is left out" for key in left]


def _pin(document: Document, path: str, value: Any) -> bool:
    """A leaf that is set is not searched any more; conditions on it are settled."""
    search = _read(document.value, ("search",))
    if not isinstance(search, dict) or path not in search:
        return False
    dimensions = cast(dict[str, Any], search)
    del dimensions[path]
    for other, dimension in list(dimensions.items()):
        when = dimension.get("when") if isinstance(dimension, dict) else None
        if not isinstance(when, dict) or path not in when:
            continue
        allowed = when.pop(path)
        if not any(same(value, v) for v in (allowed if isinstance(allowed, tuple) else (allowed,))):
            del dimensions[other]
    return True


def _door_loc(path: str) -> Loc:
    """The path in the file: below `search` a leaf's dotted path is one key."""
    first, _, rest = path.partition(".")
    if first != "search" or not rest:
        return tuple(int(p) if p.isdigit() else p for p in path.split("."))
    leaf, _, last = rest.rpartition(".")
    return ("search", leaf, last) if leaf and last in _DIMENSION_KEYS else ("search", rest)


def _read(tree: Any, loc: Loc) -> Any:
    for part in loc:
        if not isinstance(tree, Mapping):
            return None
        tree = cast(Mapping[Any, Any], tree).get(part)
    return tree


def _write(document: Document, flag: str, loc: Loc, value: Any) -> None:
    document.lines = {known: at for known, at in document.lines.items() if known[: len(loc)] != loc}
    document.lines[loc] = flag
    try:
        document.value = _written(document.value, loc, value)
    except IndexError as error:
        raise SpecError([Finding(flag, ".".join(map(str, loc)), str(error))]) from None


def _written(tree: Any, loc: Loc, value: Any) -> Any:
    if not loc:
        return value
    part, rest = loc[0], loc[1:]
    if isinstance(tree, tuple):
        items = list(cast(tuple[Any, ...], tree))
        if not isinstance(part, int) or part >= len(items):
            raise IndexError(f"a list of {len(items)} has no entry {part} (the first is 0)")
        items[part] = _written(items[part], rest, value)
        return tuple(items)
    # A group that is absent, or a shorthand in its place, becomes a mapping with this one leaf.
    group: dict[str, Any] = cast(dict[str, Any], tree) if isinstance(tree, dict) else {}
    group[str(part)] = _written(group.get(str(part)), rest, value)
    return group
