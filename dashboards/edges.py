"""Where a search should go beyond what it tried, and where it should not."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from dashboards.effects import is_log, is_number, is_numeric, levels
from dashboards.sweep_frame import SweepFrame
from orchestrator.spec.space import IntUniform, LogUniform, Uniform
from orchestrator.study.state import TrialState

_FURTHEST = math.log(2)
"""On a logarithmic scale no step beyond the tested range is longer than a factor of two."""
_OUTER = 0.1
"""Of a continuous range, this share at either end counts as its edge."""


@dataclass(frozen=True, slots=True)
class Edge:
    """The best trial lies at an end of what was searched, so that the optimum may lie outside."""

    path: str
    at: float
    low_end: bool
    beyond: tuple[float, ...]
    """Legal points to add, the nearest first; empty where there is nothing legal beyond."""
    inner: float | None
    """The tested value next to it."""


def edge(frame: SweepFrame, path: str) -> Edge | None:
    """Where the best trial lies at an end of a numeric leaf that was searched at two values or more."""
    ranked = frame.whole
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
            if _OUTER < share < 1 - _OUTER:
                return None
            low_end, end = share <= _OUTER, (low if share <= _OUTER else high)
            step = (math.log(high / low) if log else high - low) / 3
        case _:
            if at not in (tested[0], tested[-1]):
                return None
            low_end, end = at == tested[0], at
            next_in = tested[1] if low_end else tested[-2]
            step = abs(math.log(at / next_in)) if log else abs(at - next_in)
    step = min(step, _FURTHEST) if log else step
    inner = [v for v in tested if (v > at if low_end else v < at)]
    beyond = [_moved(end, step * k * (-1 if low_end else 1), log) for k in (1, 2)]
    if low_end and end > 0 and beyond[0] <= 0:
        beyond = [end / 2, end / 4]
    whole = all(isinstance(c.record.params[path], int) for c in frame.trials if path in c.record.params)
    rounded = [float(round(v)) if whole else tidy(v) for v in beyond]
    legal = [v for v in dict.fromkeys(rounded) if v != at and _legal(frame, path, int(v) if whole else v)]
    nearest = None if not inner else (inner[0] if low_end else inner[-1])
    return Edge(path, at, low_end, tuple(legal), nearest)


def known_values(frame: SweepFrame, path: str) -> list[float]:
    """The values of a numeric leaf that were tried, and those that are listed: a grid may come to them yet."""
    tried = {float(c.record.params[path]) for c in frame.trials if path in c.record.params}
    listed: tuple[Any, ...] = () if frame.space.endless(path) else frame.space.listed(path)
    return sorted(tried | {float(value) for value in listed if is_number(value)})


def between(frame: SweepFrame, path: str, a: float, b: float) -> float:
    """Half-way between two values, on the leaf's own scale."""
    return tidy(math.sqrt(a * b) if is_log(frame, path) and a > 0 and b > 0 else (a + b) / 2)


def tidy(value: float) -> float:
    """Two digits, as a person would write a hyperparameter."""
    return float(f"{value:.2g}")


def diverged_from(frame: SweepFrame, path: str) -> float | None:
    """The smallest value of a leaf from which on every finished trial diverged, while some below did not; else None."""
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


def _moved(value: float, by: float, log: bool) -> float:
    return value * math.exp(by) if log else value + by


def _legal(frame: SweepFrame, path: str, value: float) -> bool:
    """Whether a trial may have this value: the trial's own types decide."""
    params = dict(frame.ranked[0].record.params) | {path: value}
    try:
        frame.space.place(frame.spec.base, params)
    except ValueError:
        return False
    return value != 0 or not is_log(frame, path)
