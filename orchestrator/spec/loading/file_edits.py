"""`edit_yaml`: sets values in the text of a YAML file; everything else, comments and layout too, stays as it is.

Values are found by the parser's events, so that an alias is seen as one. What an edit would change besides its setting
is refused: an anchored value, a key that comes from an alias, a list with comments between its items.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from orchestrator.spec.search.dimensions import DIMENSION_KINDS

_WIDTH = 110
_MARK = "# advise: "


@dataclass(frozen=True, slots=True)
class ValueEdit:
    """A value to set: its keys from the top, YAML of one line, and a comment for the line above."""

    keys: tuple[str, ...]
    value: str
    comment: str = ""


class CannotEdit(ValueError):
    """A value cannot be set without changing something else."""


@dataclass(slots=True)
class _Node:
    """One occurrence of a value in the text. `start`, `end`: characters; an alias or a scalar has no `items`."""

    event: yaml.Event
    start: int
    end: int
    items: list[tuple[yaml.ScalarEvent | None, _Node]] = field(default_factory=list[Any])

    @property
    def is_mapping(self) -> bool:
        return isinstance(self.event, yaml.MappingStartEvent)

    @property
    def is_flow(self) -> bool:
        return bool(getattr(self.event, "flow_style", False))

    def child(self, name: str) -> tuple[yaml.ScalarEvent, _Node] | None:
        return next(((key, node) for key, node in self.items if key is not None and key.value == name), None)


def edit_yaml(text: str, edit: ValueEdit) -> str:
    """Return the text with this value.

    Raises:
        CannotEdit: with the reason.
        yaml.YAMLError: the text is no YAML.
    """
    root = _parse(text)
    node, missing = _find(text, root, edit.keys)
    if not missing:
        key, value = node
        return _replace(text, key, value, edit)
    _, mapping = node
    return _insert(text, mapping, missing, edit)


# --- reading ---------------------------------------------------------------------------------------------------------


def _parse(text: str) -> _Node:
    events = iter(list(yaml.parse(text, Loader=yaml.SafeLoader)))
    for event in events:
        if isinstance(event, yaml.DocumentStartEvent):
            return _node(next(events), events)
    raise CannotEdit("the file is empty")


def _node(event: yaml.Event, events: Iterator[yaml.Event]) -> _Node:
    node = _Node(event, event.start_mark.index, event.end_mark.index)
    if isinstance(event, yaml.MappingStartEvent):
        while not isinstance(key := next(events), yaml.MappingEndEvent):
            if not isinstance(key, yaml.ScalarEvent):
                _node(key, events)  # a key that is no word; the loader refuses it
                _node(next(events), events)
                continue
            node.items.append((key, _node(next(events), events)))
        end = key
    elif isinstance(event, yaml.SequenceStartEvent):
        while not isinstance(item := next(events), yaml.SequenceEndEvent):
            node.items.append((None, _node(item, events)))
        end = item
    else:
        return node
    # The end of a block collection is marked where the next token begins, after comments and empty lines.
    node.end = end.end_mark.index if node.is_flow else node.items[-1][1].end if node.items else node.end
    return node


def _find(text: str, root: _Node, keys: Sequence[str]) -> tuple[tuple[yaml.ScalarEvent | None, _Node], tuple[str, ...]]:
    """Return key and value of the path, or the innermost mapping of it that the file has, and the keys it lacks."""
    at: tuple[yaml.ScalarEvent | None, _Node] = (None, root)
    for depth, name in enumerate(keys):
        node = at[1]
        if isinstance(node.event, yaml.AliasEvent):
            raise CannotEdit(f"{'.'.join(keys[:depth])} is an alias (line {_line(text, node.start)})")
        if not node.is_mapping:
            raise CannotEdit(f"{'.'.join(keys[:depth])} is no mapping (line {_line(text, node.start)})")
        if getattr(node.event, "anchor", None) is not None:
            raise CannotEdit(f"{'.'.join(keys[:depth])} has an anchor (line {_line(text, node.start)})")
        found = node.child(name)
        if found is None:
            return at, tuple(keys[depth:])
        at = found
    return at, ()


def _line(text: str, index: int) -> int:
    return text.count("\n", 0, index) + 1


# --- writing ---------------------------------------------------------------------------------------------------------


def _replace(text: str, key: yaml.ScalarEvent | None, value: _Node, edit: ValueEdit) -> str:
    assert key is not None
    target = value
    if value.is_mapping:  # {log_uniform: [...]}, {choice: [...], when: ...}
        inner = next((found for kind in DIMENSION_KINDS if (found := value.child(kind))), None)
        if inner is None:
            raise CannotEdit(f"line {_line(text, value.start)} has a mapping")
        key, target = inner
    for one in (value, target):
        if getattr(one.event, "anchor", None) is not None and not isinstance(one.event, yaml.AliasEvent):
            raise CannotEdit(f"the value in line {_line(text, one.start)} has an anchor")
    before = text[target.start : target.end]
    if isinstance(target.event, yaml.SequenceStartEvent) and re.search(r"(^|\s)#", before):
        raise CannotEdit(f"the list in line {_line(text, target.start)} has comments between its items")
    start = target.start
    separator = ""
    if not isinstance(target.event, yaml.ScalarEvent | yaml.AliasEvent) and not target.is_flow:
        start = key.end_mark.index + text[key.end_mark.index : target.start].index(":") + 1  # items below the key
        separator = " "
        if text[start : target.start].strip():
            raise CannotEdit(f"line {_line(text, start)} has a comment between the key and its list")
    elif target.start == target.end:  # a key without a value
        separator = " "
    made = text[:start] + separator + edit.value + text[target.end :]
    return _with_comment(made, _line(text, key.start_mark.index) - 1, edit.comment)


def _insert(text: str, mapping: _Node, missing: tuple[str, ...], edit: ValueEdit) -> str:
    entry = edit.value
    for name in reversed(missing[1:]):
        entry = f"{{{name}: {entry}}}"
    entry = f"{missing[0]}: {entry}"
    if mapping.is_flow:
        inside = text[mapping.start : mapping.end - 1].rstrip()
        joint = "" if inside.endswith(("{", ",")) else ", "
        at = mapping.start + len(inside)
        return text[:at] + joint + entry + text[at:]
    if not mapping.items:
        raise CannotEdit(f"line {_line(text, mapping.start)} has an empty mapping")
    first, last = mapping.items[0][0], mapping.items[-1][1]
    assert first is not None
    at = text.find("\n", max(last.end, mapping.items[-1][0].end_mark.index if mapping.items[-1][0] else 0))
    newline = "\r\n" if "\r\n" in text else "\n"
    indent = " " * first.start_mark.column
    if at < 0:
        made, line = f"{text}{newline}{indent}{entry}{newline}", text.count("\n") + 1
    else:
        made, line = f"{text[: at + 1]}{indent}{entry}{newline}{text[at + 1 :]}", _line(text, at)
    return _with_comment(made, line, edit.comment)


def _with_comment(text: str, line: int, comment: str) -> str:
    """Return the text with a comment above line `line` (from 0), in place of an earlier edit's."""
    if not comment:
        return text
    lines = text.split("\n")
    first = line
    while first > 0 and lines[first - 1].lstrip().startswith(_MARK):
        first -= 1
    here = lines[line]
    indent, end = here[: len(here) - len(here.lstrip())], "\r" if here.endswith("\r") else ""
    wrapped = textwrap.wrap(comment, max(40, _WIDTH - len(indent) - len(_MARK)), break_long_words=False)
    return "\n".join([*lines[:first], *(f"{indent}{_MARK}{part}{end}" for part in wrapped), *lines[line:]])
