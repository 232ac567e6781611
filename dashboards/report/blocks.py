"""Content blocks of a panel, rendered by templates/blocks.html.j2. Texts are plain, never HTML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from dashboards.diagnosis.findings import DiagnosisFinding, FindingLevel


@dataclass(frozen=True, slots=True)
class KeyFigure:
    """A prominent figure: name, value and a note in small type."""

    name: str
    value: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class KeyFigures:
    """Several key figures in a row."""

    figures: tuple[KeyFigure, ...]
    kind: ClassVar[str] = "key_figures"


@dataclass(frozen=True, slots=True)
class Paragraph:
    """A paragraph. `strong`: emphasized; `level`: color of the emphasis."""

    text: str
    strong: bool = False
    level: FindingLevel | None = None
    kind: ClassVar[str] = "paragraph"


@dataclass(frozen=True, slots=True)
class Chart:
    """A plotly figure. `title`: heading above it; `label`: description for screen readers; `height` in pixels."""

    figure: dict[str, Any]
    title: str
    label: str
    height: int = 320
    min_width: int = 0
    """Pixels. On a narrower screen the chart scrolls inside its frame, not the page."""


@dataclass(frozen=True, slots=True)
class Charts:
    """Charts in a grid, as many per row as fit. `legend`: (color, text); `wide`: one chart per row."""

    charts: tuple[Chart, ...]
    legend: tuple[tuple[str, str], ...] = ()
    wide: bool = False
    kind: ClassVar[str] = "charts"


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of text. `numeric`: right-aligned columns; `folded`: title of a collapsed table, empty for an open one."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numeric: frozenset[int] = frozenset()
    marked: frozenset[int] = frozenset()
    """Highlighted rows."""
    folded: str = ""
    kind: ClassVar[str] = "table"


@dataclass(frozen=True, slots=True)
class Code:
    """Text with a copy button; `folded`: collapsed."""

    title: str
    text: str
    folded: bool = False
    kind: ClassVar[str] = "code"


@dataclass(frozen=True, slots=True)
class Findings:
    """Findings of the diagnosis."""

    findings: tuple[DiagnosisFinding, ...]
    kind: ClassVar[str] = "findings"


@dataclass(frozen=True, slots=True)
class ModelReply:
    """One model's answer to a prompt. `right`: result of the checker, None where not checked."""

    model_label: str
    text: str
    right: bool | None


@dataclass(frozen=True, slots=True)
class Replies:
    """A prompt, its expected answer if any, and several models' answers."""

    prompt: str
    expected: str | None
    replies: tuple[ModelReply, ...]
    kind: ClassVar[str] = "replies"


Block = KeyFigures | Paragraph | Charts | Table | Code | Findings | Replies


@dataclass(frozen=True, slots=True)
class Panel:
    """One section of the page. `key`: its anchor; `lead`: introductory sentence."""

    key: str
    title: str
    lead: str
    blocks: Sequence[Block] = field(default_factory=tuple[Block, ...])
