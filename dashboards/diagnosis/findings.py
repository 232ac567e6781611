"""`DiagnosisFinding` and `FindingLevel`: one statement of a diagnosis and its severity."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any


class FindingLevel(StrEnum):
    """serious: do not use the result; warning: act on it; note: for information."""

    SERIOUS = "serious"
    WARNING = "warning"
    NOTE = "note"


_ORDER = list(FindingLevel)


@dataclass(frozen=True, slots=True)
class DiagnosisFinding:
    """One statement of the diagnosis: title, evidence with numbers, and next step."""

    rule: str
    """Stable name of the rule, for programs that read `--json`."""
    level: FindingLevel
    title: str
    evidence: str
    next_step: str
    trials: tuple[str, ...] = ()
    """Labels of the trials concerned."""
    setting: str = ""
    """Dotted path of the setting concerned."""

    def as_json(self) -> dict[str, Any]:
        """Return the finding as printed by `report --json`."""
        values = asdict(self)
        return {"leaf" if name == "setting" else name: value for name, value in values.items()}


def by_level(findings: list[DiagnosisFinding]) -> list[DiagnosisFinding]:
    """Return the findings sorted by level, most serious first."""
    return sorted(findings, key=lambda finding: _ORDER.index(finding.level))


def round_count(count: int) -> str:
    """Format a count with two significant digits."""
    if count < 100:
        return str(count)
    return f"{round(count, 2 - len(str(count))):,}"
