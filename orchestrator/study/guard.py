"""When a trial is beyond saving, in words with the numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from trainer.metrics import EVAL
from trainer.report import GO_ON, Point, Verdict

WATCHED = ("loss", "grad_norm", f"{EVAL}loss")
"""Metrics whose loss of finiteness ends a trial: nothing after it can be trusted."""


def as_number(value: Any) -> float:
    """The value as a float; what is no number at all becomes NaN, never 0."""
    return float(value) if isinstance(value, (int, float)) else math.nan


def judge(points: Sequence[Point]) -> Verdict:
    """Stop at the first point with a non-finite loss or gradient norm, or with something that is no number."""
    for point in points:
        strange = _not_numbers(point.metrics)
        if strange:
            return Verdict(stop=True, reason=f"{strange} at step {point.step} is not a number")
        for name in WATCHED:
            value = point.metrics.get(name)
            if value is not None and not math.isfinite(value):
                return Verdict(stop=True, reason=f"diverged: {name} is {value} at step {point.step}")
    return GO_ON


def _not_numbers(metrics: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in metrics.items() if not isinstance(value, (int, float)))
