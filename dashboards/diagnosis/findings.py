"""`Finding` and `FindingLevel`: one statement of a diagnosis and its severity."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any


class FindingLevel(StrEnum):
    """serious: do not ship on this; warning: act on it; note: good to know."""

    SERIOUS = "serious"
    WARNING = "warning"
    NOTE = "note"


_ORDER = list(FindingLevel)


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing found: a title, the evidence with its numbers, and what to do next."""

    rule: str
    """Name of the rule, the same in every sweep: what programs go by."""
    level: FindingLevel
    title: str
    evidence: str
    next_step: str
    trials: tuple[str, ...] = ()
    """Labels of the trials it is about."""
    leaf: str = ""
    """Dotted path of the setting it is about."""

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)


def by_level(findings: list[Finding]) -> list[Finding]:
    """The serious ones first, else in the order found."""
    return sorted(findings, key=lambda finding: _ORDER.index(finding.level))


def round_count(count: int) -> str:
    """Two digits are enough for an estimate."""
    if count < 100:
        return str(count)
    return f"{round(count, 2 - len(str(count))):,}"
