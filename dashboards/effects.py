"""What one searched leaf did to the goal: its values compared where everything else was equal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np

from dashboards.certainty import Difference, case_values, paired_difference
from dashboards.sweep_frame import SweepFrame, TrialCase
from orchestrator.spec.space import IntUniform, LogUniform, Uniform

MOST_COMPARED = 8
"""Of a leaf with more values than this, drawn from a range, hardly two trials are equal in all else."""


@dataclass(frozen=True, slots=True, eq=False)
class Level:
    """One value of a leaf and the complete trials that had it."""

    value: Any
    cases: tuple[TrialCase, ...]
    mean: float
    best: float


def is_number(value: Any) -> bool:
    """A finite number, not a truth value."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def is_numeric(frame: SweepFrame, path: str) -> bool:
    """Whether every trial that has this leaf has a number there."""
    values = [case.record.params[path] for case in frame.trials if path in case.record.params]
    return bool(values) and all(is_number(value) for value in values)


def is_log(frame: SweepFrame, path: str) -> bool:
    """Whether this leaf is better seen in its logarithm: drawn so, or spread over a factor of 5 above 0."""
    dimension = frame.space.dimensions.get(path)
    if isinstance(dimension, LogUniform) or (isinstance(dimension, IntUniform) and dimension.log):
        return True
    if isinstance(dimension, (Uniform, IntUniform)) or not is_numeric(frame, path):
        return False
    values = [case.record.params[path] for case in frame.trials if path in case.record.params]
    return min(values) > 0 and max(values) / min(values) >= 5


def values_of(frame: SweepFrame, path: str) -> list[Any]:
    """The values that a leaf had, in order."""
    found = {repr(c.record.params[path]): c.record.params[path] for c in frame.trials if path in c.record.params}
    if is_numeric(frame, path):
        return sorted(found.values())
    return [found[key] for key in sorted(found)]


def levels(frame: SweepFrame, path: str) -> list[Level]:
    """The values of a leaf among complete trials from the start model, in order."""
    found: dict[str, list[TrialCase]] = {}
    for case in frame.whole:
        if path in case.record.params:
            found.setdefault(repr(case.record.params[path]), []).append(case)
    made = [_level(frame, path, cases) for cases in found.values()]
    if all(is_number(level.value) for level in made):
        return sorted(made, key=lambda level: level.value)
    return sorted(made, key=lambda level: str(level.value))


def _level(frame: SweepFrame, path: str, cases: Sequence[TrialCase]) -> Level:
    values = [case.record.value for case in cases if case.record.value is not None]
    best = max(values) if frame.sign > 0 else min(values)
    return Level(cases[0].record.params[path], tuple(cases), fmean(values), best)


def compared(frame: SweepFrame, path: str, a: Any, b: Any) -> tuple[Difference, int] | None:
    """Mean goal with value `a` minus with `b` over trials equal in all else, and how many such pairs of trials.

    Bootstrap over the held-out pairs. None where no two such trials left their pairs.
    """
    groups: dict[str, dict[str, TrialCase]] = {}
    for case in frame.whole:
        params = case.record.params
        if path in params:
            rest = repr(sorted((p, repr(v)) for p, v in params.items() if p != path))
            groups.setdefault(rest, {})[repr(params[path])] = case
    first = frame.whole[0].pairs if frame.whole else None
    ones, others = [], []
    for group in groups.values():
        if repr(a) in group and repr(b) in group:
            one, other = group[repr(a)], group[repr(b)]
            of_one, of_other = case_values(frame, one), case_values(frame, other)
            if of_one is None or of_other is None or first is None or one.pairs is None or other.pairs is None:
                continue
            if one.pairs.same_pairs(first) and other.pairs.same_pairs(first):
                ones.append(of_one)
                others.append(of_other)
    if not ones:
        return None
    return paired_difference(np.mean(ones, axis=0), np.mean(others, axis=0), frame.goal.metric), len(ones)


def told_apart(frame: SweepFrame, path: str) -> bool | None:
    """Whether any two values of a leaf differ clearly; None where they could not be compared."""
    values = [level.value for level in levels(frame, path)]
    if len(values) > MOST_COMPARED:
        return None
    found = [compared(frame, path, a, b) for k, a in enumerate(values) for b in values[k + 1 :]]
    known = [difference for difference in found if difference is not None]
    return any(difference.clear for difference, _ in known) if known else None
