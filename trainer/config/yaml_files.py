"""YAML 1.2 files as plain values, each with its line, and a trial's file as its configuration.

Nothing is executed, and size and nesting are limited. Plain scalars follow YAML 1.2's core schema: PyYAML implements
1.1, where `6e-7` is text and `no` is false. Of 1.1 the merge key `<<` is kept, as files with anchors need it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from trainer.config.trial import TrialConfig
from trainer.results import TrialError

MAX_BYTES = 1_000_000
"""Bytes. A sweep file has a few thousand."""
_MAX_NODES = 20_000
_MAX_DEPTH = 40
TAG = "tag:yaml.org,2002:"
_PLAIN = "?"
"""Tag of an unquoted scalar."""

Location = tuple[str | int, ...]


@dataclass(slots=True)
class Document:
    """Values with their locations: `lines` maps each path to `file:line` or to a command-line flag."""

    source: str
    value: Any = None
    lines: dict[Location, str] = field(default_factory=dict[Location, str])
    unquoted_none: list[Location] = field(default_factory=list[Location])
    """Where the file has the word None without quotes: text in YAML, and null in Python."""
    shorthands: dict[Location, Location] = field(default_factory=dict[Location, Location])
    """Places that only the expansion of a short form has, each with the place of that form in the file."""

    def as_written(self, loc: Location) -> Location:
        """Return the place that the file itself has for a place of its expanded form."""
        for end in range(len(loc), 0, -1) if loc not in self.lines else ():
            if loc[:end] in self.shorthands:
                return (*self.shorthands[loc[:end]], *loc[end:])
        return loc

    def location(self, loc: Location) -> str:
        """Return `file:line` of this path, or of the nearest group around it."""
        loc = self.as_written(loc)
        while loc and loc not in self.lines:
            loc = loc[:-1]
        return self.lines.get(loc, f"{self.source}:1")


@dataclass(frozen=True, slots=True)
class YamlProblem:
    """One error in a file: `file:line`, the path of the value and a message."""

    where: str
    path: str
    problem: str


class InvalidYaml(ValueError):
    """The file cannot be read as YAML. Holds all problems."""

    def __init__(self, problems: list[YamlProblem]) -> None:
        self.problems = problems
        super().__init__("; ".join(f"{p.where}: {p.problem}" for p in problems))


def read_yaml(path: Path) -> Document:
    """Parse a file. Raises InvalidYaml with all problems."""
    return parse_yaml(_read_text(path), str(path))


def parse_yaml(text: str, source: str) -> Document:
    """Parse YAML 1.2; `source` is the file's name in problems. Raises InvalidYaml with all problems."""
    try:
        root = _Loader(text, source).get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{source}:{mark.line + 1}" if mark else source
        raise InvalidYaml([YamlProblem(where, "", _syntax_error(error, text, mark))]) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise InvalidYaml([YamlProblem(f"{source}:{line}", "", "a control character; YAML is text")]) from None
    if root is None:
        raise InvalidYaml([YamlProblem(f"{source}:1", "", "the file is empty")])
    document = Document(source)
    builder = _Builder(document)
    document.value = builder.build(root, ())
    if builder.problems:
        raise InvalidYaml(sorted(builder.problems, key=lambda problem: int(problem.where.rpartition(":")[2])))
    return document


class _Loader(yaml.SafeLoader):
    """Composes nodes only; stops at the limits on nodes and depth before a hostile document fills the memory."""

    def __init__(self, text: str, source: str) -> None:
        super().__init__(text)
        self.name = source
        self._nodes = self._depth = 0

    def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
        """Give unquoted scalars their own tag, so that `parse_scalar` reads them by YAML 1.2 instead of 1.1."""
        return _PLAIN if kind is yaml.ScalarNode and implicit[0] else super().resolve(kind, value, (False, True))

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Compose one node with its children. Raises MarkedYAMLError above a limit on nodes or depth."""
        self._nodes += 1
        self._depth += 1
        if self._nodes > _MAX_NODES or self._depth > _MAX_DEPTH:
            problem = (
                f"more than {_MAX_NODES} values"
                if self._nodes > _MAX_NODES
                else f"nested deeper than {_MAX_DEPTH} levels"
            )
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=self.peek_event().start_mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


_Pairs = dict[str, tuple[yaml.Node, yaml.Node]]
"""Keys of a mapping, each with the nodes of key and value."""


class _Builder:
    """Converts nodes to values. An alias counts each time it is used; `<<` adds the keys that a mapping lacks."""

    def __init__(self, document: Document) -> None:
        self._document, self._built = document, 0
        self._merged: dict[int, _Pairs | None] = {}
        self.problems: list[YamlProblem] = []

    def build(self, node: yaml.Node, loc: Location) -> Any:
        """Return the value of the node at this location and record its line; problems go to `problems`."""
        self._document.lines.setdefault(loc, self._at(node))
        self._built += 1
        if self._built > _MAX_NODES or len(loc) > _MAX_DEPTH:
            if self._built <= _MAX_NODES + 1:
                self._add_error(node, loc[:2], "aliases expand without end or to too many values")
            self._built = _MAX_NODES + 1
            return None
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, loc)
        if isinstance(node, yaml.SequenceNode):
            if node.tag != f"{TAG}seq":
                self._add_error(node, loc, f"the tag {node.tag} has no meaning here")
            return tuple(self.build(item, (*loc, i)) for i, item in enumerate(node.value))
        return self._scalar(node, loc)

    def _mapping(self, node: yaml.MappingNode, loc: Location) -> dict[str, Any]:
        if node.tag != f"{TAG}map":
            self._add_error(node, loc, f"the tag {node.tag} has no meaning here")
        out: dict[str, Any] = {}
        for key, (key_node, value_node) in self._pairs(node, loc).items():
            self._document.lines[*loc, key] = self._at(key_node)
            out[key] = self.build(value_node, (*loc, key))
        return out

    def _pairs(self, node: yaml.MappingNode, loc: Location) -> _Pairs:
        """Return the mapping's own keys, then those of `<<` that it does not have, the first mapping's first.

        Each mapping is read once, so that its mistakes are reported once and `<<` in `<<` costs no more than its keys.
        """
        if (known := self._merged.get(id(node))) is not None:
            return known
        self._merged[id(node)] = None
        own: _Pairs = {}
        merged: list[yaml.Node] = []
        merge_key: yaml.Node | None = None
        for key_node, value_node in node.value:
            if _is_merge_key(key_node):
                if merge_key is not None:
                    first = self._at(merge_key)
                    self._add_error(key_node, loc, f"<< is given twice (first at {first}); write <<: [*one, *other]")
                merge_key = merge_key or key_node
                merged += value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]
                continue
            key = self._key(key_node, loc)
            if key is None:
                continue
            if key in own:
                self._add_error(key_node, (*loc, key), f"given twice (first at {self._at(own[key][0])})")
                continue
            own[key] = (key_node, value_node)
        for other in merged:
            if self._merged.get(id(other), own) is None:
                self._add_error(merge_key or node, loc, "<<: a mapping cannot contain itself")
            elif isinstance(other, yaml.MappingNode):
                own = own | {key: pair for key, pair in self._pairs(other, loc).items() if key not in own}
            else:
                self._add_error(merge_key or node, loc, "<< takes a mapping or a list of mappings, such as <<: *name")
        self._merged[id(node)] = own
        return own

    def _key(self, node: yaml.Node, loc: Location) -> str | None:
        if not isinstance(node, yaml.ScalarNode):
            self._add_error(node, loc, "a key must be a word")
            return None
        return str(node.value)

    def _scalar(self, node: yaml.Node, loc: Location) -> Any:
        if node.tag == _PLAIN and node.value == "None":
            self._document.unquoted_none.append(loc)
        try:
            return parse_scalar(node.value) if node.tag == _PLAIN else parse_tagged_scalar(node.tag, node.value)
        except InvalidScalar as error:
            self._add_error(node, loc, str(error))
            return None

    def _add_error(self, node: yaml.Node, loc: Location, problem: str) -> None:
        path = ".".join(str(part) for part in loc)
        self.problems.append(YamlProblem(self._at(node), path, problem))

    def _at(self, node: yaml.Node) -> str:
        return f"{self._document.source}:{node.start_mark.line + 1}"


def _is_merge_key(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.tag == _PLAIN and node.value == "<<"


def _read_text(path: Path) -> str:
    source = str(path)
    if not path.is_file():
        what = "is not a file" if path.exists() else "there is no such file"
        raise InvalidYaml([YamlProblem(source, "", what)])
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise InvalidYaml([YamlProblem(source, "", f"cannot be read: {error.strerror}")]) from None
    if len(data) > MAX_BYTES:
        raise InvalidYaml([YamlProblem(source, "", f"larger than {MAX_BYTES} bytes; a sweep file has a few thousand")])
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InvalidYaml([YamlProblem(f"{source}:{line}", "", "not UTF-8 text")]) from None


def _syntax_error(error: yaml.MarkedYAMLError, text: str, mark: yaml.Mark | None) -> str:
    line = text.split("\n")[mark.line] if mark and mark.line < text.count("\n") + 1 else ""
    if "\t" in line[: len(line) - len(line.lstrip())] or (mark and line[mark.column : mark.column + 1] == "\t"):
        return "a tab; YAML indents with spaces"
    if (
        (bound := re.match(r">=[^,}\]#]*", line[line.find(">=") :]))
        and mark
        and 0 <= mark.column - line.find(">=") <= 1
    ):
        return f'{bound[0].strip()} needs quotes, as > begins a text of several lines: write "{bound[0].strip()}"'
    found = " ".join(part for part in (error.context, error.problem) if part) or "not YAML"
    indented = (error.context or "").startswith("while parsing a block")
    return f"{found}; check the indentation: keys of one mapping begin at the same column" if indented else found


# --- scalars ---------------------------------------------------------------------------------------------------------

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
    """A scalar that can be no value of a sweep."""


def parse_scalar(text: str) -> str | int | float | bool | None:
    """Return the value of an unquoted scalar."""
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
            raise InvalidScalar(f"{text} is beyond the range of numbers")
        return number
    return text


def parse_tagged_scalar(tag: str, text: str) -> str | int | float | bool | None:
    """Return the value of a scalar that says its core type itself (`!!str 5`)."""
    if tag == f"{TAG}str":
        return text
    expected = _CORE_TYPES.get(tag)
    if expected is None:
        raise InvalidScalar(f"the tag {tag} has no meaning here")
    value = parse_scalar(text)
    if not isinstance(value, expected):
        raise InvalidScalar(f"{text!r} is no {tag.removeprefix(TAG)}")
    return float(value) if tag == f"{TAG}float" and isinstance(value, int) else value


# --- a trial's file --------------------------------------------------------------------------------------------------


class InvalidTrialFile(TrialError):
    """The file cannot be read as one trial's configuration; `problems` holds a sentence for each mistake."""

    def __init__(self, path: Path, problems: list[str]) -> None:
        super().__init__("\n".join(f"{path}: {problem}" for problem in problems))
        self.problems = problems


def load_trial(path: Path, changes: Sequence[tuple[str, Any]] = ()) -> TrialConfig:
    """Return the configuration in a YAML file, with the values at some dotted paths replaced.

    InvalidTrialFile with all mistakes where it is none.
    """
    try:
        document = read_yaml(path)
    except InvalidYaml as error:
        raise InvalidTrialFile(path, [_yaml_message(path, problem) for problem in error.problems]) from error
    for where, value in changes:
        document.value = _changed(document.value, where.split("."), value)
    try:
        return TrialConfig.model_validate(document.value)
    except ValidationError as reason:
        changed = tuple(f"{where}." for where, _ in changes)
        messages: list[str] = []
        for error in reason.errors():
            is_in_file = not f"{'.'.join(map(str, error['loc']))}.".startswith(changed)
            place = _line(path, document.location(error["loc"])) if is_in_file else ""
            messages.append(place + _error_message(error))
        raise InvalidTrialFile(path, messages) from reason


def _yaml_message(path: Path, problem: YamlProblem) -> str:
    return _line(path, problem.where) + (f"{problem.path}: " if problem.path else "") + problem.problem


def _line(path: Path, where: str) -> str:
    number = where.removeprefix(f"{path}:")
    return f"line {number}: " if number.isdigit() else ""


def _changed(tree: Any, path: Sequence[str], value: Any) -> Any:
    """Return the tree with one value replaced; a group that is absent, or a value in its place, becomes a group."""
    if not path:
        return value
    first, *rest = path
    if isinstance(tree, tuple) and first.isdigit() and int(first) < len(tree):
        return tuple(_changed(each, rest, value) if i == int(first) else each for i, each in enumerate(tree))
    group = tree if isinstance(tree, dict) else {}
    return {**group, first: _changed(group.get(first), rest, value)}


def _error_message(error: Any) -> str:
    where = ".".join(str(part) for part in error["loc"]) or "the file"
    if error["type"] == "extra_forbidden":
        return f"{where}: there is no such key"
    if error["type"] == "missing":
        return f"{where}: is missing"
    message = str(error["msg"]).removeprefix("Value error, ")
    shown = "" if isinstance(error["input"], dict) else f" (given: {error['input']!r})"
    return f"{where}: {message[:1].lower()}{message[1:]}{shown}"
