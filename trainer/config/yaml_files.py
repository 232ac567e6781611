"""A trial's YAML to its configuration; every mistake in it as one sentence.

YAML 1.2's core schema: what a plain scalar means. PyYAML's own is 1.1, where `6e-7` is text and `no` is false.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError

from trainer.config.trial import TrialConfig
from trainer.results import TrialError


class BadTrial(TrialError):
    """The file cannot be read as one trial's configuration; `problems` holds a sentence for each mistake."""

    def __init__(self, path: Path, problems: list[str]) -> None:
        super().__init__("\n".join(f"{path}: {problem}" for problem in problems))
        self.problems = problems


class _Loader(yaml.SafeLoader):
    """YAML 1.2's numbers, and no key twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping; a key given twice is an error at its line."""
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise ConstructorError(None, None, "a key that is no text", key_node.start_mark)
            if key in seen:
                raise ConstructorError(None, None, f"{key} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """No aliases: a few lines of them can stand for billions."""
        if self.check_event(yaml.AliasEvent):
            raise ComposerError(None, None, "aliases (*name) are not used here", self.peek_event().start_mark)
        return super().compose_node(parent, index)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:float"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\.\d+|\d+(\.\d*)?)([eE][-+]?\d+)?|[-+]?\.(inf|Inf)|\.nan"),
    list("-+.0123456789"),
)


def load_trial(path: Path) -> TrialConfig:
    """The configuration in a YAML file. BadTrial with all mistakes where it is none."""
    return trial_of(path, ())


def trial_of(path: Path, changes: Sequence[tuple[str, Any]]) -> TrialConfig:
    """Like `load_trial`, with the values at some dotted paths replaced."""
    try:
        given = yaml.load(path.read_text(encoding="utf-8"), _Loader)  # noqa: S506
    except (OSError, UnicodeDecodeError) as why:
        raise BadTrial(path, [f"cannot be read: {why}"]) from why
    except yaml.MarkedYAMLError as why:
        line = f"line {why.problem_mark.line + 1}: " if why.problem_mark else ""
        raise BadTrial(path, [f"{line}{why.problem}"]) from why
    except (yaml.YAMLError, RecursionError) as why:
        raise BadTrial(path, [f"no YAML: {why}"]) from why
    for where, value in changes:
        given = _changed(given, where.split("."), value)
    try:
        return TrialConfig.model_validate(given)
    except ValidationError as why:
        raise BadTrial(path, [_sentence(error) for error in why.errors()]) from why


def _changed(tree: Any, path: Sequence[str], value: Any) -> Any:
    """The tree with one value replaced; a group that is absent, or a value in its place, becomes a group."""
    if not path:
        return value
    first, *rest = path
    if isinstance(tree, list) and first.isdigit() and int(first) < len(tree):
        return [_changed(each, rest, value) if i == int(first) else each for i, each in enumerate(tree)]
    group = tree if isinstance(tree, dict) else {}
    return {**group, first: _changed(group.get(first), rest, value)}


def _sentence(error: Any) -> str:
    where = ".".join(str(part) for part in error["loc"]) or "the file"
    if error["type"] == "extra_forbidden":
        return f"{where}: there is no such key"
    if error["type"] == "missing":
        return f"{where}: is missing"
    said = str(error["msg"]).removeprefix("Value error, ")
    shown = "" if isinstance(error["input"], dict) else f" (given: {error['input']!r})"
    return f"{where}: {said[:1].lower()}{said[1:]}{shown}"


TAG = "tag:yaml.org,2002:"

_NULL = re.compile(r"~|null|Null|NULL|")
_TRUE = re.compile(r"true|True|TRUE")
_FALSE = re.compile(r"false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9]+")
_OCTAL = re.compile(r"0o[0-7]+")
_HEX = re.compile(r"0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_LONGEST = 64
_CORE: dict[str, type | tuple[type, ...]] = {
    f"{TAG}int": int,
    f"{TAG}float": (int, float),
    f"{TAG}bool": bool,
    f"{TAG}null": type(None),
}


class BadScalar(ValueError):
    """A scalar that can be no value of a sweep."""


def plain(text: str) -> str | int | float | bool | None:
    """The value of an unquoted scalar."""
    if _NULL.fullmatch(text):
        return None
    if _TRUE.fullmatch(text):
        return True
    if _FALSE.fullmatch(text):
        return False
    if _NOT_FINITE.fullmatch(text):
        raise BadScalar(f"{text} is not a finite number")
    if len(text) > _LONGEST:
        return text
    for pattern, base in ((_INT, 10), (_OCTAL, 8), (_HEX, 16)):
        if pattern.fullmatch(text):
            return int(text, base)
    if _FLOAT.fullmatch(text):
        number = float(text)
        if number in (float("inf"), float("-inf")):
            raise BadScalar(f"{text} is beyond the range of numbers")
        return number
    return text


def tagged(tag: str, text: str) -> str | int | float | bool | None:
    """The value of a scalar that says its core type itself (`!!str 5`)."""
    if tag == f"{TAG}str":
        return text
    wanted = _CORE.get(tag)
    if wanted is None:
        raise BadScalar(f"the tag {tag} has no meaning here")
    value = plain(text)
    if not isinstance(value, wanted):
        raise BadScalar(f"{text!r} is no {tag.removeprefix(TAG)}")
    return float(value) if tag == f"{TAG}float" and isinstance(value, int) else value
