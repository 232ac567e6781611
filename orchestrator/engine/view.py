"""What the engine tells whoever looks on. Implemented in dashboards: live.py, lines.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from orchestrator.study.records import TrialRecord
from trainer.report import Point

StepsOf = Callable[[Mapping[str, Any]], int]


class View(Protocol):
    """Every call returns at once; a view never decides anything."""

    def stage(self, text: str) -> None:
        """What the sweep is busy with before its trials."""
        ...

    def say(self, text: str) -> None:
        """A line that stays."""
        ...

    def expect(self, steps: StepsOf) -> None:
        """The number of updates of a trial by its params, once known."""
        ...

    def trial_changed(self, record: TrialRecord) -> None:
        """A trial began, ended or was issued again."""
        ...

    def points(self, number: int, points: Sequence[Point]) -> None:
        """New metrics of a trial."""
        ...

    def tick(self) -> None:
        """Time passed."""
        ...

    def close(self) -> None:
        """Leave the terminal as it was."""
        ...
