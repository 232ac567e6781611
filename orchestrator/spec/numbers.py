"""YAML 1.2's core schema: what a plain scalar means. PyYAML's own is 1.1, where `6e-7` is text and `no` is false."""

from __future__ import annotations

import re

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
