"""Effect of each searched setting: values compared where all else was equal; optimum at the boundary; seed variance."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np

from dashboards.analysis.significance import Difference, paired_difference, trial_values
from dashboards.analysis.sweep_frame import SweepFrame, TrialFrame
from orchestrator.spec.search.dimensions import IntUniform, LogUniform, Uniform
from orchestrator.study.trial_records import TrialState

MAX_COMPARED = 8
"""Of a setting with more values than this, drawn from a range, hardly two trials are equal in all else."""


@dataclass(frozen=True, slots=True, eq=False)
class ParamLevel:
    """One value of a setting and the complete trials that had it."""

    value: Any
    trials: tuple[TrialFrame, ...]
    mean: float
    best: float


def is_number(value: Any) -> bool:
    """A finite number, not a truth value."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def is_numeric(frame: SweepFrame, path: str) -> bool:
    """Whether every trial that has this setting has a number there."""
    values = [trial.record.params[path] for trial in frame.trials if path in trial.record.params]
    return bool(values) and all(is_number(value) for value in values)


def is_log(frame: SweepFrame, path: str) -> bool:
    """Whether this setting is better seen in its logarithm: drawn so, or spread over a factor of 5 above 0."""
    dimension = frame.space.dimensions.get(path)
    if isinstance(dimension, LogUniform) or (isinstance(dimension, IntUniform) and dimension.log):
        return True
    if isinstance(dimension, (Uniform, IntUniform)) or not is_numeric(frame, path):
        return False
    values = [trial.record.params[path] for trial in frame.trials if path in trial.record.params]
    return min(values) > 0 and max(values) / min(values) >= 5


def values_of(frame: SweepFrame, path: str) -> list[Any]:
    """The values that a setting had, in order."""
    found = {repr(c.record.params[path]): c.record.params[path] for c in frame.trials if path in c.record.params}
    if is_numeric(frame, path):
        return sorted(found.values())
    return [found[key] for key in sorted(found)]


def levels(frame: SweepFrame, path: str) -> list[ParamLevel]:
    """The values of a setting among complete trials from the initial model, in order."""
    found: dict[str, list[TrialFrame]] = {}
    for trial in frame.comparable_trials:
        if path in trial.record.params:
            found.setdefault(repr(trial.record.params[path]), []).append(trial)
    made = [_level(frame, path, trials) for trials in found.values()]
    if all(is_number(level.value) for level in made):
        return sorted(made, key=lambda level: level.value)
    return sorted(made, key=lambda level: str(level.value))


def _level(frame: SweepFrame, path: str, trials: Sequence[TrialFrame]) -> ParamLevel:
    values = [trial.record.value for trial in trials if trial.record.value is not None]
    best = max(values) if frame.sign > 0 else min(values)
    return ParamLevel(trials[0].record.params[path], tuple(trials), fmean(values), best)


def matched_difference(frame: SweepFrame, path: str, a: Any, b: Any) -> tuple[Difference, int] | None:
    """Mean objective with value `a` minus with `b` over trials equal in all else, and how many such pairs of trials.

    Bootstrap over the held-out pairs. None where no two such trials left their pairs.
    """
    groups: dict[str, dict[str, TrialFrame]] = {}
    for trial in frame.comparable_trials:
        params = trial.record.params
        if path in params:
            rest = repr(sorted((p, repr(v)) for p, v in params.items() if p != path))
            groups.setdefault(rest, {})[repr(params[path])] = trial
    first = frame.comparable_trials[0].pairs if frame.comparable_trials else None
    ones, others = [], []
    for group in groups.values():
        if repr(a) in group and repr(b) in group:
            one, other = group[repr(a)], group[repr(b)]
            of_one, of_other = trial_values(frame, one), trial_values(frame, other)
            if of_one is None or of_other is None or first is None or one.pairs is None or other.pairs is None:
                continue
            if one.pairs.same_pairs(first) and other.pairs.same_pairs(first):
                ones.append(of_one)
                others.append(of_other)
    if not ones:
        return None
    return paired_difference(np.mean(ones, axis=0), np.mean(others, axis=0), frame.objective.metric), len(ones)


def has_clear_effect(frame: SweepFrame, path: str) -> bool | None:
    """Whether any two values of a setting differ clearly; None where they could not be compared."""
    values = [level.value for level in levels(frame, path)]
    if len(values) > MAX_COMPARED:
        return None
    found = [matched_difference(frame, path, a, b) for k, a in enumerate(values) for b in values[k + 1 :]]
    known = [difference for difference in found if difference is not None]
    return any(difference.is_clear for difference, _ in known) if known else None


_MAX_EXTENSION = math.log(2)
"""On a logarithmic scale no step beyond the tested range is longer than a factor of two."""
_EDGE_FRACTION = 0.1
"""Of a continuous range, this share at either end counts as its edge."""


@dataclass(frozen=True, slots=True)
class BoundaryOptimum:
    """The best trial lies at an end of what was searched, so that the optimum may lie outside."""

    path: str
    value: float
    is_low_end: bool
    extension: tuple[float, ...]
    """Legal points to add, the nearest first; empty where there is nothing legal beyond."""
    inner: float | None
    """The tested value next to it."""


def boundary_optimum(frame: SweepFrame, path: str) -> BoundaryOptimum | None:
    """Where the best trial lies at an end of a numeric setting that was searched at two values or more."""
    ranked = frame.comparable_trials
    if not ranked or path not in ranked[0].record.params or not is_numeric(frame, path):
        return None
    tested = known_values(frame, path)
    if len(tested) < 2 or len(levels(frame, path)) < 2:
        return None
    at, log = float(ranked[0].record.params[path]), is_log(frame, path)
    dimension = frame.space.dimensions.get(path)
    match dimension:
        case Uniform(uniform=(low, high)) | LogUniform(log_uniform=(low, high)) | IntUniform(int_uniform=(low, high)):
            share = _share(at, low, high, log)
            if _EDGE_FRACTION < share < 1 - _EDGE_FRACTION:
                return None
            low_end, end = share <= _EDGE_FRACTION, (low if share <= _EDGE_FRACTION else high)
            step = (math.log(high / low) if log else high - low) / 3
        case _:
            if at not in (tested[0], tested[-1]):
                return None
            low_end, end = at == tested[0], at
            next_in = tested[1] if low_end else tested[-2]
            step = abs(math.log(at / next_in)) if log else abs(at - next_in)
    step = min(step, _MAX_EXTENSION) if log else step
    inner = [v for v in tested if (v > at if low_end else v < at)]
    beyond = [_shifted(end, step * k * (-1 if low_end else 1), log) for k in (1, 2)]
    if low_end and end > 0 and beyond[0] <= 0:
        beyond = [end / 2, end / 4]
    is_integer = all(isinstance(c.record.params[path], int) for c in frame.trials if path in c.record.params)
    rounded = [float(round(v)) if is_integer else round_value(v) for v in beyond]
    legal = [v for v in dict.fromkeys(rounded) if v != at and _is_valid(frame, path, int(v) if is_integer else v)]
    nearest = None if not inner else (inner[0] if low_end else inner[-1])
    return BoundaryOptimum(path, at, low_end, tuple(legal), nearest)


def known_values(frame: SweepFrame, path: str) -> list[float]:
    """The values of a numeric setting that were tried, and those that are listed: a grid may come to them yet."""
    tried = {float(c.record.params[path]) for c in frame.trials if path in c.record.params}
    listed: tuple[Any, ...] = () if frame.space.is_continuous(path) else frame.space.listed_values(path)
    return sorted(tried | {float(value) for value in listed if is_number(value)})


def midpoint(frame: SweepFrame, path: str, a: float, b: float) -> float:
    """Half-way between two values, on the setting's own scale."""
    return round_value(math.sqrt(a * b) if is_log(frame, path) and a > 0 and b > 0 else (a + b) / 2)


def round_value(value: float) -> float:
    """Two digits, as a person would write a hyperparameter."""
    return float(f"{value:.2g}")


def diverged_from(frame: SweepFrame, path: str) -> float | None:
    """Return the smallest value of a setting at or above which every finished trial diverged; None without one.

    Some trial below that value must have finished without diverging.
    """
    if not is_numeric(frame, path):
        return None
    ended = [
        (float(c.record.params[path]), c.record.diverged)
        for c in frame.in_state(TrialState.COMPLETE, TrialState.PRUNED)
        if path in c.record.params
    ]
    safe = max((value for value, diverged in ended if not diverged), default=-math.inf)
    beyond = [value for value, diverged in ended if diverged and value > safe]
    return min(beyond) if beyond and math.isfinite(safe) else None


def mostly_diverged_from(frame: SweepFrame, path: str) -> float | None:
    """The smallest value from which at least half of the finished trials (two or more) diverged; None without one."""
    ended = sorted(
        (float(c.record.params[path]), c.record.diverged)
        for c in frame.in_state(TrialState.COMPLETE, TrialState.PRUNED)
        if path in c.record.params and is_number(c.record.params[path])
    )
    for at in dict.fromkeys(value for value, _ in ended):
        there = [diverged for value, diverged in ended if value >= at]
        if sum(there) >= 2 and 2 * sum(there) >= len(there):
            return at
    return None


def _share(value: float, low: float, high: float, log: bool) -> float:
    return math.log(value / low) / math.log(high / low) if log else (value - low) / (high - low)


def _shifted(value: float, by: float, log: bool) -> float:
    return value * math.exp(by) if log else value + by


def _is_valid(frame: SweepFrame, path: str, value: float) -> bool:
    """Whether a trial may have this value: the trial's own types decide."""
    params = dict(frame.ranked[0].record.params) | {path: value}
    try:
        frame.space.apply(frame.spec.base, params)
    except ValueError:
        return False
    return value != 0 or not is_log(frame, path)


SEED = "training.seed"


@dataclass(frozen=True, slots=True, eq=False)
class SeedGroup:
    """Complete trials that differ in the seed alone: mean and standard deviation of the objective."""

    trials: tuple[TrialFrame, ...]
    paths: tuple[str, ...]
    mean: float
    spread: float


def seed_groups(frame: SweepFrame) -> list[SeedGroup]:
    """Configurations with two seeds or more, best mean first; empty where the seed was not searched."""
    if SEED not in frame.paths:
        return []
    paths = tuple(p for p in frame.paths if p != SEED)
    found: dict[str, list[TrialFrame]] = {}
    for trial in frame.comparable_trials:
        found.setdefault(repr([trial.record.params.get(p) for p in paths]), []).append(trial)
    groups = [_group(trials, paths) for trials in found.values() if len(trials) > 1]
    return sorted(groups, key=lambda group: -frame.sign * group.mean)


def _group(trials: list[TrialFrame], paths: tuple[str, ...]) -> SeedGroup:
    values = [trial.record.value for trial in trials if trial.record.value is not None]
    return SeedGroup(tuple(trials), paths, statistics.fmean(values), statistics.stdev(values))
