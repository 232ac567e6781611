"""The same configuration trained with several seeds: what chance alone does."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from dashboards.sweep_frame import SweepFrame, TrialCase

SEED = "training.seed"


@dataclass(frozen=True, slots=True, eq=False)
class SeedGroup:
    """Complete trials that differ in the seed alone: mean and standard deviation of the goal."""

    cases: tuple[TrialCase, ...]
    paths: tuple[str, ...]
    mean: float
    spread: float


def seed_groups(frame: SweepFrame) -> list[SeedGroup]:
    """Configurations with two seeds or more, best mean first; empty where the seed was not searched."""
    if SEED not in frame.paths:
        return []
    paths = tuple(p for p in frame.paths if p != SEED)
    found: dict[str, list[TrialCase]] = {}
    for case in frame.whole:
        found.setdefault(repr([case.record.params.get(p) for p in paths]), []).append(case)
    groups = [_group(cases, paths) for cases in found.values() if len(cases) > 1]
    return sorted(groups, key=lambda group: -frame.sign * group.mean)


def _group(cases: list[TrialCase], paths: tuple[str, ...]) -> SeedGroup:
    values = [case.record.value for case in cases if case.record.value is not None]
    return SeedGroup(tuple(cases), paths, statistics.fmean(values), statistics.stdev(values))
