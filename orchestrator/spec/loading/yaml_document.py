"""A YAML 1.2 file as plain values, each with its line. Nothing is executed; ambiguous values are reported."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from orchestrator.errors import Finding, SpecError, closest_match
from trainer.config.yaml_files import TAG, InvalidScalar, parse_scalar, parse_tagged_scalar

MAX_BYTES = 1_000_000
"""Bytes. A sweep file has a few thousand."""
_MAX_NODES = 20_000
_MAX_DEPTH = 40
_PLAIN = "?"
"""Tag of an unquoted scalar."""

Location = tuple[str | int, ...]


@dataclass(slots=True)
class Document:
    """Values with their locations: `lines` maps each path to `file:line` or to a command-line flag."""

    source: str
    value: Any = None
    lines: dict[Location, str] = field(default_factory=dict[Location, str])

    def location(self, loc: Location) -> str:
        """Return `file:line` of this path, or of the nearest group around it."""
        while loc and loc not in self.lines:
            loc = loc[:-1]
        return self.lines.get(loc, f"{self.source}:1")


def read_document(path: Path) -> Document:
    """Parse a YAML file. Raises SpecError with all findings."""
    return parse_document(_read_text(path), str(path))


def parse_document(text: str, source: str) -> Document:
    """Parse YAML 1.2; `source` is the file's name in findings. Raises SpecError with all findings."""
    try:
        root = _Loader(text, source).get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise SpecError([_finding(source, mark, _syntax_error(error, text, mark))]) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise SpecError([Finding(f"{source}:{line}", "", "a control character; YAML is text")]) from None
    document = Document(source)
    if root is None:
        raise SpecError([Finding(f"{source}:1", "", "the file is empty")])
    builder = _Builder(document)
    document.value = builder.build(root, ())
    if builder.findings:
        raise SpecError(builder.findings)
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


class _Builder:
    """Converts nodes to values. An alias counts each time it is used."""

    def __init__(self, document: Document) -> None:
        self._document, self._built = document, 0
        self.findings: list[Finding] = []

    def build(self, node: yaml.Node, loc: Location) -> Any:
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
        first: dict[str, str] = {}
        for key_node, value_node in node.value:
            key = self._key(key_node, loc)
            if key is None:
                continue
            if key in out:
                self._add_error(key_node, (*loc, key), f"given twice (first at {first[key]})")
                continue
            first[key] = self._document.lines[(*loc, key)] = self._at(key_node)
            out[key] = self.build(value_node, (*loc, key))
        return out

    def _key(self, node: yaml.Node, loc: Location) -> str | None:
        if not isinstance(node, yaml.ScalarNode):
            self._add_error(node, loc, "a key must be a word")
            return None
        if node.tag == _PLAIN and node.value == "<<":
            self._add_error(node, loc, "the merge key << is not YAML 1.2; write the keys out")
            return None
        return str(node.value)

    def _scalar(self, node: yaml.Node, loc: Location) -> Any:
        try:
            return parse_scalar(node.value) if node.tag == _PLAIN else parse_tagged_scalar(node.tag, node.value)
        except InvalidScalar as error:
            self._add_error(node, loc, str(error))
            return None

    def _add_error(self, node: yaml.Node, loc: Location, problem: str) -> None:
        path = ".".join(str(part) for part in loc)
        self.findings.append(Finding(self._at(node), path, problem))

    def _at(self, node: yaml.Node) -> str:
        return f"{self._document.source}:{node.start_mark.line + 1}"


def _read_text(path: Path) -> str:
    source = str(path)
    if not path.is_file():
        known = sorted(p.name for p in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
        near = closest_match(path.name, known)
        hint = f"did you mean {path.parent / near}?" if near else ""
        what = "is not a file" if path.exists() else "there is no such file"
        raise SpecError([Finding(source, "", what, hint)])
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise SpecError([Finding(source, "", f"cannot be read: {error.strerror}")]) from None
    if len(data) > MAX_BYTES:
        raise SpecError([Finding(source, "", f"larger than {MAX_BYTES} bytes; a sweep file has a few thousand")])
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise SpecError([Finding(f"{source}:{line}", "", "not UTF-8 text")]) from None


def _finding(source: str, mark: yaml.Mark | None, problem: str) -> Finding:
    return Finding(f"{source}:{mark.line + 1}" if mark else source, "", problem)


def _syntax_error(error: yaml.MarkedYAMLError, text: str, mark: yaml.Mark | None) -> str:
    line = text.split("\n")[mark.line] if mark and mark.line < text.count("\n") + 1 else ""
    if "\t" in line[: len(line) - len(line.lstrip())] or (mark and line[mark.column : mark.column + 1] == "\t"):
        return "a tab; YAML indents with spaces"
    return " ".join(part for part in (error.context, error.problem) if part) or "not YAML"
