"""One thing that the doctor looked at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any


class Level(StrEnum):
    """ok; warn: worth knowing; fail: sweeps, or this sweep, will not run."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Check:
    """What was looked at, what was found, and how to put it right."""

    what: str
    level: Level
    found: str
    fix: str = ""

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)


def healthy(checks: Sequence[Check]) -> bool:
    """Whether sweeps can run here."""
    return all(check.level is not Level.FAIL for check in checks)
