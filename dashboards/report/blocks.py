"""Content blocks of a panel, as the page's template knows them. Text is plain, never HTML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from dashboards.diagnosis.findings import Finding, FindingLevel


@dataclass(frozen=True, slots=True)
class KeyFigure:
    """A figure to see first: its name, its value, and what is to be known beside it."""

    name: str
    value: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class KeyFigures:
    """Several figures in a row."""

    facts: tuple[KeyFigure, ...]
    kind: ClassVar[str] = "facts"


@dataclass(frozen=True, slots=True)
class Paragraph:
    """A paragraph. `strong`: something to see; `level`: and how bad it is."""

    text: str
    strong: bool = False
    level: FindingLevel | None = None
    kind: ClassVar[str] = "words"


@dataclass(frozen=True, slots=True)
class Chart:
    """A plotly figure. `title` stands above it, `label` says to a screen reader what is to be seen."""

    figure: dict[str, Any]
    title: str
    label: str
    height: int = 320
    min_width: int = 0
    """In pixels; a narrower screen scrolls inside the chart's frame, never the page."""


@dataclass(frozen=True, slots=True)
class Charts:
    """Charts side by side, as many as fit. `legend`: color and words."""

    charts: tuple[Chart, ...]
    legend: tuple[tuple[str, str], ...] = ()
    wide: bool = False
    kind: ClassVar[str] = "charts"


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of text. `folded`: shown on demand under this title."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numeric: frozenset[int] = frozenset()
    marked: frozenset[int] = frozenset()
    """Rows to see first."""
    folded: str = ""
    kind: ClassVar[str] = "table"


@dataclass(frozen=True, slots=True)
class Code:
    """Text to copy."""

    title: str
    text: str
    folded: bool = False
    kind: ClassVar[str] = "code"


@dataclass(frozen=True, slots=True)
class Findings:
    """The diagnosis."""

    findings: tuple[Finding, ...]
    kind: ClassVar[str] = "findings"


@dataclass(frozen=True, slots=True)
class ModelReply:
    """One model's answer to a prompt."""

    model_label: str
    text: str
    right: bool | None


@dataclass(frozen=True, slots=True)
class Replies:
    """A prompt and its answers side by side."""

    prompt: str
    expected: str | None
    replies: tuple[ModelReply, ...]
    kind: ClassVar[str] = "replies"


Block = KeyFigures | Paragraph | Charts | Table | Code | Findings | Replies


@dataclass(frozen=True, slots=True)
class Panel:
    """One section of the page."""

    key: str
    title: str
    lead: str
    blocks: Sequence[Block] = field(default_factory=tuple[Block, ...])
