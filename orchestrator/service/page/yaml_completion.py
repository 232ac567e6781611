"""Completion of a sweep file in the editor: keys and values that the schema allows where the cursor is."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from orchestrator.spec.loading.serialization import schema

_MOST = 40
_KEY = re.compile(r"""(?P<indent> *)(?P<dashes>(?:- +)*)(?:(?P<key>"[^"]*"|'[^']*'|[\w.-]+) *:(?= |$))?""")
_WORD = re.compile(r"[\w.+-]*$")
Node = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A text that may be inserted, and what the setting means."""

    text: str
    about: str


@dataclass(frozen=True, slots=True)
class Completion:
    """What may stand at the cursor. `begin`: column at which the word under the cursor begins."""

    begin: int
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True, slots=True)
class _Line:
    """Where the parts of a line stand."""

    outer: int
    """Column of its first list mark, or of its key."""
    inner: int
    """Column of its key, after list marks."""
    key: str


def complete(text: str, line: int, column: int) -> Completion:
    """Return what may stand in a sweep file at this line and column, both counted from 0."""
    lines = text.split("\n")
    before = lines[line][:column] if line < len(lines) else ""
    if "#" in before:
        return Completion(column, ())
    match = _WORD.search(before)
    word = match[0] if match else ""
    path, is_value = _place(lines[:line], before[: len(before) - len(word)])
    nodes = list(_nodes(path))
    found = _values(nodes) if is_value else _keys(nodes)
    kept = _fitting(word, {candidate.text: candidate for candidate in found}.values())
    return Completion(column - len(word), tuple(kept[:_MOST]))


def _fitting(word: str, candidates: Iterable[Candidate]) -> list[Candidate]:
    """Return the candidates that begin with the word, then those that have it inside."""
    lower = word.lower()
    listed = [each for each in candidates if lower in each.text.lower()]
    return sorted(listed, key=lambda each: not each.text.lower().startswith(lower))


def _place(earlier: list[str], before: str) -> tuple[list[str], bool]:
    """Return the path of the mapping or value at the cursor, and whether a value is expected."""
    own = _parsed(before)
    match = _KEY.match(before)
    rest = before[match.end() :] if match else before
    path = _parents(earlier, own)
    if not own.key and not rest.strip():
        return path, False
    flow, is_value = _flow([own.key] if own.key else [], rest)
    return [*path, *flow], is_value


def _parents(earlier: list[str], own: _Line) -> list[str]:
    """Return the keys of the mappings that the line is in, the outermost first."""
    path: list[str] = []
    limit, is_item = own.outer, own.outer != own.inner
    for text in reversed(earlier):
        if not text.strip() or text.lstrip().startswith("#"):
            continue
        line = _parsed(text)
        if line.inner < limit or (is_item and line.inner == limit and line.outer == line.inner):
            if line.key:
                path.insert(0, line.key)
            limit, is_item = line.outer, line.outer != line.inner
        elif line.outer < limit <= line.inner:  # the list item whose first line this is
            limit, is_item = line.outer, True
    return path


def _parsed(text: str) -> _Line:
    match = _KEY.match(text)
    assert match is not None
    outer = len(match["indent"])
    return _Line(outer, outer + len(match["dashes"]), (match["key"] or "").strip("\"'"))


def _flow(path: list[str], rest: str) -> tuple[list[str], bool]:
    """Follow `{a: {b: ` behind a key; return the path and whether a value is expected."""
    stack: list[tuple[str, int]] = []
    current, word = list(path), ""
    is_value = bool(path)
    for character in rest:
        if character in "{[":
            stack.append((character, len(current)))
            is_value, word = character == "[", ""
        elif character in "}]" and stack:
            current, is_value, word = current[: stack.pop()[1]], False, ""
        elif character == "," and stack:
            current, is_value, word = current[: stack[-1][1]], stack[-1][0] == "[", ""
        elif character == ":" and stack and stack[-1][0] == "{" and word.strip():
            current, is_value, word = [*current[: stack[-1][1]], word.strip(" \"'")], True, ""
        else:
            word += character
    return current, is_value


@cache
def _schema() -> Node:
    return schema()


def _members(node: Node) -> Iterator[Node]:
    """Yield the alternatives of a node; of a list also those of its items."""
    if "$ref" in node:
        yield from _members({**_schema()["$defs"][node["$ref"].rpartition("/")[2]]})
    for key in ("anyOf", "oneOf", "allOf"):
        for member in node.get(key, ()):
            yield from _members(member)
    if isinstance(node.get("items"), Mapping):
        yield from _members(node["items"])
    yield node


def _nodes(path: list[str]) -> Iterator[Node]:
    """Yield the schemas of what is at a path."""
    nodes: list[Node] = list(_members(_schema()))
    for key in path:
        found: list[Node] = []
        for node in nodes:
            inner = node.get("properties", {}).get(key, node.get("additionalProperties"))
            if isinstance(inner, Mapping):
                found += [{"description": inner.get("description", "")}, *_members(inner)]
        nodes = found
    yield from nodes


def _keys(nodes: Iterable[Node]) -> Iterator[Candidate]:
    for node in nodes:
        for key, inner in node.get("properties", {}).items():
            yield Candidate(f"{key}: ", _about(inner))
        names = node.get("propertyNames", {})
        for key in names.get("enum", ()):
            yield Candidate(f"{key}: ", "")


def _values(nodes: Iterable[Node]) -> Iterator[Candidate]:
    for node in nodes:
        about = node.get("description", "")
        for value in (*node.get("enum", ()), *([node["const"]] if "const" in node else [])):
            yield Candidate(_text(value), about)
        if node.get("type") == "boolean":
            yield from (Candidate(word, about) for word in ("true", "false"))
        if node.get("default") is not None and not isinstance(node["default"], Mapping | list):
            yield Candidate(_text(node["default"]), "the default")


def _about(node: Node) -> str:
    """Return what a setting means, and its default."""
    about = next((each["description"] for each in _members(node) if each.get("description")), "")
    about = node.get("description") or about
    default = node.get("default")
    shown = "" if default is None or isinstance(default, Mapping | list) else f" By default {_text(default)}."
    return f"{about}{shown}".strip()


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
