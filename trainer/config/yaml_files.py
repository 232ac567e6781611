"""Read a trial's YAML file into its configuration; each error is one line.

Plain scalars follow YAML 1.2's core schema. PyYAML implements 1.1, where `6e-7` is text and `no` is false.
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


class InvalidTrialFile(TrialError):
    """The file is not a valid trial configuration; `problems` has a line for each error."""

    def __init__(self, path: Path, problems: list[str]) -> None:
        super().__init__("\n".join(f"{path}: {problem}" for problem in problems))
        self.problems = problems


class _Loader(yaml.SafeLoader):
    """YAML 1.2's numbers; duplicate keys and aliases are errors."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Construct a mapping; a duplicate key is an error at its line."""
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise ConstructorError(None, None, "a key that is not text", key_node.start_mark)
            if key in seen:
                raise ConstructorError(None, None, f"{key} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Refuse aliases: a few lines of them can expand to billions of values."""
        if self.check_event(yaml.AliasEvent):
            raise ComposerError(None, None, "aliases (*name) are not supported", self.peek_event().start_mark)
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
    """Return the configuration in a YAML file. Raises InvalidTrialFile with all errors."""
    return trial_of(path, ())


def trial_of(path: Path, changes: Sequence[tuple[str, Any]]) -> TrialConfig:
    """Like `load_trial`, with values at some dotted paths replaced."""
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), _Loader)  # noqa: S506
    except (OSError, UnicodeDecodeError) as reason:
        raise InvalidTrialFile(path, [f"cannot be read: {reason}"]) from reason
    except yaml.MarkedYAMLError as reason:
        line = f"line {reason.problem_mark.line + 1}: " if reason.problem_mark else ""
        raise InvalidTrialFile(path, [f"{line}{reason.problem}"]) from reason
    except (yaml.YAMLError, RecursionError) as reason:
        raise InvalidTrialFile(path, [f"not YAML: {reason}"]) from reason
    for path_of_change, value in changes:
        data = _replaced(data, path_of_change.split("."), value)
    try:
        return TrialConfig.model_validate(data)
    except ValidationError as reason:
        raise InvalidTrialFile(path, [_error_message(error) for error in reason.errors()]) from reason


def _replaced(tree: Any, path: Sequence[str], value: Any) -> Any:
    """Return the tree with one value replaced; a missing group, or a scalar in its place, becomes a group."""
    if not path:
        return value
    first, *rest = path
    if isinstance(tree, list) and first.isdigit() and int(first) < len(tree):
        return [_replaced(each, rest, value) if i == int(first) else each for i, each in enumerate(tree)]
    group = tree if isinstance(tree, dict) else {}
    return {**group, first: _replaced(group.get(first), rest, value)}


def _error_message(error: Any) -> str:
    where = ".".join(str(part) for part in error["loc"]) or "the file"
    if error["type"] == "extra_forbidden":
        return f"{where}: unknown key"
    if error["type"] == "missing":
        return f"{where}: missing"
    message = str(error["msg"]).removeprefix("Value error, ")
    shown = "" if isinstance(error["input"], dict) else f" (given: {error['input']!r})"
    return f"{where}: {message[:1].lower()}{message[1:]}{shown}"


TAG = "tag:yaml.org,2002:"

_NULL = re.compile(r"~|null|Null|NULL|")
_TRUE = re.compile(r"true|True|TRUE")
_FALSE = re.compile(r"false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9]+")
_OCTAL = re.compile(r"0o[0-7]+")
_HEX = re.compile(r"0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_MAX_SCALAR_LENGTH = 64
_CORE_TYPES: dict[str, type | tuple[type, ...]] = {
    f"{TAG}int": int,
    f"{TAG}float": (int, float),
    f"{TAG}bool": bool,
    f"{TAG}null": type(None),
}


class InvalidScalar(ValueError):
    """A scalar that is not a valid value."""


def parse_scalar(text: str) -> str | int | float | bool | None:
    """Return the value of an unquoted scalar. Raises InvalidScalar for a number that is not finite."""
    if _NULL.fullmatch(text):
        return None
    if _TRUE.fullmatch(text):
        return True
    if _FALSE.fullmatch(text):
        return False
    if _NOT_FINITE.fullmatch(text):
        raise InvalidScalar(f"{text} is not a finite number")
    if len(text) > _MAX_SCALAR_LENGTH:
        return text
    for pattern, base in ((_INT, 10), (_OCTAL, 8), (_HEX, 16)):
        if pattern.fullmatch(text):
            return int(text, base)
    if _FLOAT.fullmatch(text):
        number = float(text)
        if number in (float("inf"), float("-inf")):
            raise InvalidScalar(f"{text} is beyond the range of floating-point numbers")
        return number
    return text


def parse_tagged_scalar(tag: str, text: str) -> str | int | float | bool | None:
    """Return the value of a scalar with an explicit core type (`!!str 5`). Raises InvalidScalar."""
    if tag == f"{TAG}str":
        return text
    expected = _CORE_TYPES.get(tag)
    if expected is None:
        raise InvalidScalar(f"the tag {tag} is not supported")
    value = parse_scalar(text)
    if not isinstance(value, expected):
        raise InvalidScalar(f"{text!r} is not of type {tag.removeprefix(TAG)}")
    return float(value) if tag == f"{TAG}float" and isinstance(value, int) else value
