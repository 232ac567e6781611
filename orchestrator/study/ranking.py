"""Which trial is better."""

from __future__ import annotations

import math
from collections.abc import Iterable

from orchestrator.spec.sweep import Goal
from orchestrator.study.records import TrialRecord
from orchestrator.study.state import TrialState


def ranking(records: Iterable[TrialRecord], goal: Goal) -> list[TrialRecord]:
    """Complete trials, best first; equal values in order of number. Non-finite values never rank."""
    sign = -1.0 if goal.direction == "maximize" else 1.0
    done = [(sign * r.value, r.number, r) for r in records if r.value is not None and _ranks(r, r.value)]
    return [record for _, _, record in sorted(done, key=lambda row: row[:2])]


def _ranks(record: TrialRecord, value: float) -> bool:
    return record.state is TrialState.COMPLETE and math.isfinite(value)
