"""Effect of each searched setting: matched comparisons of its values, boundary optima, divergence, seed variance."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from dashboards.analysis.significance import compared_trials
from dashboards.analysis.simultaneous_intervals import Difference
from dashboards.analysis.small_samples import ROUNDING_TOLERANCE
from dashboards.analysis.sweep_frame import SweepFrame, TrialFrame
from orchestrator.spec.search.dimensions import IntUniform, LogUniform, Uniform
from orchestrator.study.repeats import mean_interval
from orchestrator.study.trial_records import TrialState

SEED = "training.seed"
MAX_COMPARED = 8
"""Values of a setting. With more values (a sampled range), few trials match in all other settings."""


@dataclass(frozen=True, slots=True, eq=False)
class ParamLevel:
    """One value of a setting, the complete trials that had it, and mean and best of their objective."""

    value: Any
    trials: tuple[TrialFrame, ...]
    mean: float
    best: float


def is_number(value: Any) -> bool:
    """Return whether the value is a finite int or float, not a bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def is_numeric_setting(frame: SweepFrame, path: str) -> bool:
    """Return whether all values of this setting are numbers."""
    values = [trial.record.params[path] for trial in frame.trials if path in trial.record.params]
    return bool(values) and all(is_number(value) for value in values)


def is_log(frame: SweepFrame, path: str) -> bool:
    """Return whether to use a log scale: sampled log-uniformly, or positive values spanning a factor of 5 or more."""
    dimension = frame.space.dimensions.get(path)
    if isinstance(dimension, LogUniform) or (isinstance(dimension, IntUniform) and dimension.log):
        return True
    if isinstance(dimension, (Uniform, IntUniform)) or not is_numeric_setting(frame, path):
        return False
    values = [trial.record.params[path] for trial in frame.trials if path in trial.record.params]
    return min(values) > 0 and max(values) / min(values) >= 5


def values_of(frame: SweepFrame, path: str) -> list[Any]:
    """Return the distinct values of a setting over all trials, sorted."""
    found = {
        repr(trial.record.params[path]): trial.record.params[path]
        for trial in frame.trials
        if path in trial.record.params
    }
    if is_numeric_setting(frame, path):
        return sorted(found.values())
    return [found[key] for key in sorted(found)]


def levels(frame: SweepFrame, path: str) -> list[ParamLevel]:
    """Return the values of a setting among complete trials from the initial model, sorted."""
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


Matched = tuple[Difference, int]
"""A difference between two values of a setting, and the number of matched pairs of trials behind it."""

_MATCHED: WeakKeyDictionary[SweepFrame, dict[tuple[str, str, str], Matched]] = WeakKeyDictionary()


def matched_difference(frame: SweepFrame, path: str, a: Any, b: Any) -> Matched | None:
    """Return the effect of a setting from trials that are equal in all other settings.

    Returns:
        Mean objective with value `a` minus with `b`, and the number of matched pairs of trials; its joint interval
        holds together with those of all pairs of values of all settings. None where no matched trials have the same
        held-out pairs.
    """
    if frame not in _MATCHED:
        _MATCHED[frame] = _matched_differences(frame)
    return _MATCHED[frame].get((path, repr(a), repr(b)))


def matched_groups(frame: SweepFrame, paths: Sequence[str]) -> list[dict[tuple[str, ...], int]]:
    """Return groups of comparable trials that are equal in all settings but these.

    Each group: values of `paths`, as text, -> the trial's column of `compared_trials`.
    """
    compared = compared_trials(frame)
    groups: dict[str, dict[tuple[str, ...], int]] = {}
    for k, trial in enumerate(() if compared is None else compared.trials):
        params = trial.record.params
        if trial.record.fork is None and all(path in params for path in paths):
            rest = repr(sorted((p, repr(v)) for p, v in params.items() if p not in paths))
            groups.setdefault(rest, {}).setdefault(tuple(repr(params[path]) for path in paths), k)
    return list(groups.values())


def _matched_differences(frame: SweepFrame) -> dict[tuple[str, str, str], Matched]:
    """Return the matched differences of all pairs of values of all settings but the seed, as one family."""
    compared = compared_trials(frame)
    keys: list[tuple[str, str, str]] = []
    counts: list[int] = []
    weights: list[NDArray[np.float64]] = []
    if compared is None:
        return {}
    for path in (p for p in frame.paths if p != SEED):
        groups = matched_groups(frame, [path])
        values = list(dict.fromkeys(value for group in groups for value in group))
        for (a,), (b,) in combinations(values, 2):
            both = [group for group in groups if (a,) in group and (b,) in group]
            if both:
                weight = np.zeros(len(compared.trials))
                for group in both:
                    weight[group[a,]] += 1 / len(both)
                    weight[group[b,]] -= 1 / len(both)
                keys.append((path, a, b))
                counts.append(len(both))
                weights.append(weight)
    if not keys:
        return {}
    found = compared.columns.contrasts(np.stack(weights, axis=1))
    out = {key: (difference, count) for key, difference, count in zip(keys, found, counts, strict=True)}
    return out | {(path, b, a): (difference.reversed, count) for (path, a, b), (difference, count) in out.items()}


def has_clear_effect(frame: SweepFrame, path: str) -> bool | None:
    """Return whether any two values of a setting differ significantly; None where no comparison was possible."""
    values = [level.value for level in levels(frame, path)]
    if len(values) > MAX_COMPARED:
        return None
    found = [matched_difference(frame, path, a, b) for k, a in enumerate(values) for b in values[k + 1 :]]
    known = [difference for difference in found if difference is not None]
    return any(difference.is_clear for difference, _ in known) if known else None


def difference_to_winner(frame: SweepFrame, path: str, level: ParamLevel) -> Difference | None:
    """Return the best comparable trial's value of a setting minus this one's.

    From trials that are equal in all other settings; where there are none, from the best trial with either value. None
    without common held-out pairs.
    """
    best = frame.comparable_trials[0]
    found = matched_difference(frame, path, best.record.params[path], level.value)
    return found[0] if found is not None else difference_of_trials(frame, best, level.trials[0])


def difference_of_trials(frame: SweepFrame, a: TrialFrame, b: TrialFrame) -> Difference | None:
    """Return the objective of trial a minus b's, jointly over all pairs of trials; None without common pairs."""
    compared = compared_trials(frame)
    return None if compared is None else compared.difference(a, b)


_MAX_EXTENSION = math.log(2)
"""Nats of the setting. On a log scale no step past the tested range exceeds a factor of two."""
_EDGE_FRACTION = 0.1
"""Share of a continuous range at either end that counts as its boundary."""


@dataclass(frozen=True, slots=True)
class BoundaryOptimum:
    """The best trial lies at an end of the searched values, so that the optimum may lie outside."""

    path: str
    value: float
    is_low_end: bool
    extension: tuple[float, ...]
    """Valid values to add outside the range, nearest first; empty where none is valid."""
    inner: float | None
    """Nearest tested value inside the range."""


def boundary_optimum(frame: SweepFrame, path: str) -> BoundaryOptimum | None:
    """Return the boundary optimum of a numeric setting with at least two values.

    None where the best lies inside, where a trial with another value has the same objective, and where none of them
    is clearly worse.
    """
    ranked = frame.comparable_trials
    if not ranked or path not in ranked[0].record.params or not is_numeric_setting(frame, path):
        return None
    tested = known_values(frame, path)
    if len(tested) < 2 or len(levels(frame, path)) < 2:
        return None
    best, log = float(ranked[0].record.params[path]), is_log(frame, path)
    dimension = frame.space.dimensions.get(path)
    match dimension:
        case Uniform(uniform=(low, high)) | LogUniform(log_uniform=(low, high)) | IntUniform(int_uniform=(low, high)):
            share = _share(best, low, high, log)
            if _EDGE_FRACTION < share < 1 - _EDGE_FRACTION:
                return None
            is_low_end, end = share <= _EDGE_FRACTION, (low if share <= _EDGE_FRACTION else high)
            step = (math.log(high / low) if log else high - low) / 3
        case _:
            if best not in (tested[0], tested[-1]):
                return None
            is_low_end, end = best == tested[0], best
            next_in = tested[1] if is_low_end else tested[-2]
            step = abs(math.log(best / next_in)) if log else abs(best - next_in)
    others = [trial for trial in ranked[1:] if trial.record.params.get(path) != ranked[0].record.params[path]]
    inside = [trial for trial in others if not _at_end(frame, path, trial, is_low_end, end, log)]
    if any(_ties_with_best(frame, trial) for trial in others) or _is_noise(frame, inside):
        return None
    step = min(step, _MAX_EXTENSION) if log else step
    inner = [v for v in tested if (v > best if is_low_end else v < best)]
    outside = [_shifted(end, step * k * (-1 if is_low_end else 1), log) for k in (1, 2)]
    if is_low_end and end > 0 and outside[0] <= 0:
        outside = [end / 2, end / 4]
    is_integer = all(
        isinstance(trial.record.params[path], int) for trial in frame.trials if path in trial.record.params
    )
    rounded = [float(round(v)) if is_integer else round_value(v) for v in outside]
    valid = [v for v in dict.fromkeys(rounded) if v != best and is_valid(frame, path, int(v) if is_integer else v)]
    nearest = None if not inner else (inner[0] if is_low_end else inner[-1])
    return BoundaryOptimum(path, best, is_low_end, tuple(valid), nearest)


def stable_extension(frame: SweepFrame, found: BoundaryOptimum) -> tuple[float, ...]:
    """Return the values to add outside the range, without those from which upwards most trials diverged."""
    if found.is_low_end:
        return found.extension
    limits = (diverged_from(frame, found.path), mostly_diverged_from(frame, found.path))
    return tuple(v for v in found.extension if all(limit is None or v < limit for limit in limits))


def _at_end(frame: SweepFrame, path: str, trial: TrialFrame, is_low_end: bool, end: float, log: bool) -> bool:
    """Return whether a trial's value lies at the same end of the searched values as the best one's."""
    value: Any = trial.record.params.get(path)
    if not is_number(value):
        return False
    match frame.space.dimensions.get(path):
        case Uniform(uniform=(low, high)) | LogUniform(log_uniform=(low, high)) | IntUniform(int_uniform=(low, high)):
            share = _share(float(value), low, high, log)
            return share <= _EDGE_FRACTION if is_low_end else share >= 1 - _EDGE_FRACTION
        case _:
            return float(value) == end


def _ties_with_best(frame: SweepFrame, trial: TrialFrame) -> bool:
    value, best = trial.record.value, frame.comparable_trials[0].record.value
    if value is None or best is None:
        return False
    return math.isclose(value, best, rel_tol=1e-9, abs_tol=ROUNDING_TOLERANCE)


def _is_noise(frame: SweepFrame, inside: Sequence[TrialFrame]) -> bool:
    """Return whether the best trial is clearly better than none of these, as far as that can be computed."""
    best = frame.comparable_trials[0]
    found = [difference for trial in inside if (difference := difference_of_trials(frame, best, trial)) is not None]
    return bool(found) and not any(difference.is_clear for difference in found)


def known_values(frame: SweepFrame, path: str) -> list[float]:
    """Return the tried values of a numeric setting and those listed in the search space, sorted."""
    tried = {float(trial.record.params[path]) for trial in frame.trials if path in trial.record.params}
    listed: tuple[Any, ...] = () if frame.space.is_continuous(path) else frame.space.listed_values(path)
    return sorted(tried | {float(value) for value in listed if is_number(value)})


def midpoint(frame: SweepFrame, path: str, a: float, b: float) -> float:
    """Return the midpoint of two values: geometric on a log scale, else arithmetic."""
    return round_value(math.sqrt(a * b) if is_log(frame, path) and a > 0 and b > 0 else (a + b) / 2)


def round_value(value: float) -> float:
    """Round to two significant digits."""
    return float(f"{value:.2g}")


def diverged_from(frame: SweepFrame, path: str) -> float | None:
    """Return the smallest value of a setting from which upwards every finished trial diverged; None without one.

    Requires that a trial with a smaller value finished without diverging.
    """
    if not is_numeric_setting(frame, path):
        return None
    ended = [
        (float(trial.record.params[path]), trial.record.diverged)
        for trial in frame.in_state(TrialState.COMPLETE, TrialState.PRUNED)
        if path in trial.record.params
    ]
    safe = max((value for value, diverged in ended if not diverged), default=-math.inf)
    beyond = [value for value, diverged in ended if diverged and value > safe]
    return min(beyond) if beyond and math.isfinite(safe) else None


def mostly_diverged_from(frame: SweepFrame, path: str) -> float | None:
    """Return the smallest value from which upwards at least half of the finished trials, and at least two, diverged."""
    ended = sorted(
        (float(trial.record.params[path]), trial.record.diverged)
        for trial in frame.in_state(TrialState.COMPLETE, TrialState.PRUNED)
        if path in trial.record.params and is_number(trial.record.params[path])
    )
    for at in dict.fromkeys(value for value, _ in ended):
        diverged_above = [diverged for value, diverged in ended if value >= at]
        if sum(diverged_above) >= 2 and 2 * sum(diverged_above) >= len(diverged_above):
            return at
    return None


def _share(value: float, low: float, high: float, log: bool) -> float:
    return math.log(value / low) / math.log(high / low) if log else (value - low) / (high - low)


def _shifted(value: float, by: float, log: bool) -> float:
    return value * math.exp(by) if log else value + by


def is_valid(frame: SweepFrame, path: str, value: Any) -> bool:
    """Return whether the winner's configuration with this value passes validation."""
    params = dict(frame.ranked[0].record.params) | {path: value}
    try:
        frame.space.apply(frame.spec.base, params)
    except ValueError:
        return False
    return value != 0 or not is_log(frame, path)


@dataclass(frozen=True, slots=True, eq=False)
class SeedGroup:
    """Complete trials that differ only in the seed; mean, standard deviation, 95% interval of their objective."""

    trials: tuple[TrialFrame, ...]
    paths: tuple[str, ...]
    mean: float
    spread: float
    interval: tuple[float, float] | None


def seed_groups(frame: SweepFrame) -> list[SeedGroup]:
    """Return configurations with at least two complete seeds, best mean first; empty where no seed was repeated."""
    by_number = {trial.number: trial for trial in frame.all_trials}
    groups = [
        _group([by_number[s.trial] for s in trial.record.seeds if s.state is TrialState.COMPLETE], frame.paths)
        for trial in frame.comparable_trials
        if frame.seed_trials and trial.record.complete_seeds > 1
    ]
    return sorted(groups, key=lambda group: -frame.sign * group.mean)


def _group(trials: list[TrialFrame], paths: tuple[str, ...]) -> SeedGroup:
    values = [trial.record.value for trial in trials if trial.record.value is not None]
    return SeedGroup(tuple(trials), paths, fmean(values), statistics.stdev(values), mean_interval(values))
