"""The same bug again and again: a sweep whose every trial would fail alike is stopped."""

from __future__ import annotations

from orchestrator.engine.messages import End, EndKind
from orchestrator.study.state import FailureKind
from orchestrator.study.study import Study

SAME_BUGS = 3


class SameBug:
    """Counts trials that ended in one and the same bug, one after the other."""

    def __init__(self, study: Study) -> None:
        self._study = study
        self._last, self._count = "", 0

    def count(self, end: End) -> str:
        """One more trial ended by itself; why the sweep should stop, in words, or nothing."""
        if end.kind is not EndKind.FAILED or (end.failure or FailureKind.BUG) is not FailureKind.BUG:
            self._last, self._count = "", 0
            return ""
        self._count = self._count + 1 if end.signature == self._last else 1
        self._last = end.signature
        if max(self._count, self._study.consecutive_bugs()[0]) < SAME_BUGS:
            return ""
        return f"the same bug ended {SAME_BUGS} trials in a row: {end.reason}"
