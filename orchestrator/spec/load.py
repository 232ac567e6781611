"""A sweep's file into a SweepSpec: every error at once, each with its line; nothing else happens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from orchestrator.errors import Finding, SpecError
from orchestrator.spec.document import Document, parse, read_document
from orchestrator.spec.door import build
from orchestrator.spec.expand import expand, find_files
from orchestrator.spec.overrides import override
from orchestrator.spec.problems import Findings, show
from orchestrator.spec.sweep import DOOR, SweepSpec


@dataclass(frozen=True, slots=True)
class Loaded:
    """A sweep, and what the person should know about how its file was read."""

    spec: SweepSpec
    notices: tuple[str, ...]
    document: Document
    """The file, for findings that are made later."""


def load(path: Path, sets: Sequence[str] = (), *, name: str | None = None) -> SweepSpec:
    """The sweep in this file, with `--set` overrides and another name if given; SpecError with every finding."""
    return read(path, sets, name=name).spec


def read(path: Path, sets: Sequence[str] = (), *, name: str | None = None) -> Loaded:
    """Like `load`, with the notices."""
    return _read(read_document(path), path.resolve().parent, sets, name)


def loads(text: str, folder: Path, sets: Sequence[str] = (), *, source: str = "sweep.yaml") -> SweepSpec:
    """Like `load`, from text; files it names are looked for in `folder` first."""
    return _read(parse(text, source), folder, sets, None).spec


def _read(document: Document, folder: Path, sets: Sequence[str], name: str | None) -> Loaded:
    findings = Findings(document)
    if not isinstance(document.value, dict):
        findings.add((), f"a sweep is a mapping with the keys {', '.join(DOOR)}; this is {show(document.value)}")
        raise SpecError(findings.items)
    tree = cast(dict[str, Any], document.value)
    expand(tree)
    notices = override(document, sets, findings.items)
    if name is not None:
        tree["name"] = name
        document.lines["name",] = f"--name {name}"
    expand(tree)
    find_files(findings, tree, folder)
    spec = build(findings, tree)
    if spec is None:
        raise SpecError(sorted(findings.items, key=_place))
    return Loaded(spec, tuple(notices), document)


def _place(finding: Finding) -> tuple[str, int]:
    source, _, line = finding.where.rpartition(":")
    return (source, int(line)) if line.isdigit() else (finding.where, 0)
