"""What follows a trial's end: the disk is tidied, and now and then the sweep describes itself."""

from __future__ import annotations

import time

from orchestrator.driving.describing import tell_standing
from orchestrator.driving.forks import tidy_forks
from orchestrator.driving.mirrored import Upkeep
from orchestrator.driving.retention import Retention
from orchestrator.study.records import TrialRecord
from orchestrator.study.study import Study
from orchestrator.tracking.sink import Sink

_DESCRIBED_EVERY = 10.0
"""Seconds: a sweep of many short trials need not describe itself after each."""
_SHARE = 0.01
"""Of the driver's time: describing two thousand trials takes longer, so it is done less often."""


class Afterwards:
    """Called after each ended trial."""

    def __init__(self, study: Study, sink: Sink, mirror: Upkeep | None = None) -> None:
        self._study, self._sink = study, sink
        removed = None if mirror is None else mirror.removed
        self._retention = Retention(study.folder, study.spec, study.trials(), removed)
        tidy_forks(study.folder, study)
        self._due = 0.0

    def __call__(self, record: TrialRecord) -> None:
        """This trial has ended."""
        self._retention.closed(record)
        tidy_forks(self._study.folder, self._study)
        began = time.monotonic()
        if began >= self._due:
            tell_standing(self._study, self._sink)
            took = time.monotonic() - began
            self._due = began + max(_DESCRIBED_EVERY, took / _SHARE)
