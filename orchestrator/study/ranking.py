"""Which trial is better."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from orchestrator.spec.goal import Goal
from orchestrator.study.records import TrialRecord
from orchestrator.study.state import TrialState


def ranking(records: Iterable[TrialRecord], *goals: Goal) -> list[TrialRecord]:
    """Complete trials, best first; equal ones in order of number. Non-finite values never rank.

    With several goals, by how many fronts lie before the trial's own (non-dominated sorting), then by the first goal.
    """
    left = [record for record in records if _ranks(record)]
    out: list[TrialRecord] = []
    while left:
        layer = left if len(goals) == 1 else _undominated(left, goals)
        out += sorted(layer, key=lambda r: (_costs(r, goals)[0], r.number))
        left = [record for record in left if record not in layer]
    return out


def front(records: Iterable[TrialRecord], goals: Sequence[Goal]) -> list[TrialRecord]:
    """The Pareto front, best in the first goal first: trials that no other one equals or beats in every goal."""
    ranked = [record for record in records if _ranks(record)]
    return sorted(_undominated(ranked, goals), key=lambda r: (_costs(r, goals), r.number))


def _undominated(records: Sequence[TrialRecord], goals: Sequence[Goal]) -> list[TrialRecord]:
    costs = [_costs(record, goals) for record in records]
    return [r for r, mine in zip(records, costs, strict=True) if not any(_dominates(other, mine) for other in costs)]


def _dominates(a: Sequence[float], b: Sequence[float]) -> bool:
    return a != b and all(x <= y for x, y in zip(a, b, strict=True))


def _costs(record: TrialRecord, goals: Sequence[Goal]) -> tuple[float, ...]:
    """The values, less being better."""
    values = record.values or (() if record.value is None else (record.value,))
    return tuple(-v if g.direction == "maximize" else v for v, g in zip(values, goals, strict=False))


def _ranks(record: TrialRecord) -> bool:
    if record.state is not TrialState.COMPLETE or record.value is None:
        return False
    return all(math.isfinite(value) for value in record.values or (record.value,))
