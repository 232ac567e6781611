"""What every way of looking shares: a sweep as one tidy value, made from the study's records and points."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from orchestrator.study.records import TrialRecord
from orchestrator.study.state import TrialState
from trainer.report import Point


@dataclass(slots=True)
class TrialView:
    """One trial as it is shown: its record, and the courses of a few metrics."""

    record: TrialRecord
    courses: dict[str, list[tuple[int, float]]] = field(default_factory=dict[str, list[tuple[int, float]]])

    def add(self, points: Iterable[Point]) -> None:
        """Append points; a step seen before changes nothing."""
        for point in points:
            for name, value in point.metrics.items():
                course = self.courses.setdefault(name, [])
                if not course or point.step > course[-1][0]:
                    course.append((point.step, value))

    def values(self, name: str) -> list[float]:
        """A metric's values in order of steps."""
        return [value for _, value in self.courses.get(name, ())]

    def last(self, name: str) -> float | None:
        """A metric's newest value."""
        course = self.courses.get(name)
        return course[-1][1] if course else self.record.metrics.get(name)

    @property
    def step(self) -> int:
        """The newest update seen."""
        newest = max((course[-1][0] for course in self.courses.values() if course), default=0)
        return max(newest, self.record.step)


def endings(records: Iterable[TrialRecord]) -> dict[str, int]:
    """How many trials stand how, in words, only those that occur; diverged ones are told from pruned ones."""
    out = dict.fromkeys([*(s.lower() for s in TrialState), "diverged"], 0)
    for record in records:
        out["diverged" if record.diverged else record.state.lower()] += 1
    return {word: count for word, count in out.items() if count}


def told(found: Mapping[str, int]) -> str:
    """`9 complete, 1 pruned`."""
    return ", ".join(f"{count} {word}" for word, count in found.items())


def short_names(paths: Sequence[str]) -> dict[str, str]:
    """The shortest endings that tell the paths apart: loss.beta -> beta."""
    out: dict[str, str] = {}
    for path in paths:
        parts = path.split(".")
        for k in range(1, len(parts) + 1):
            tail = ".".join(parts[-k:])
            if sum(p == tail or p.endswith("." + tail) for p in paths) == 1:
                out[path] = tail
                break
        else:
            out[path] = path
    return out


def show(value: Any) -> str:
    """A hyperparameter or metric in few characters: 6e-07, 0.7312, sigmoid."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int):
        return str(value)
    if not math.isfinite(value):
        return str(value)
    if value and (abs(value) < 1e-3 or abs(value) >= 1e5):
        mantissa, exponent = f"{value:.3e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return f"{value:.4g}"


def brief(value: float | None) -> str:
    """A measured value in three digits."""
    return "–" if value is None else show(float(f"{value:.3g}"))


def signed(value: float) -> str:
    """A change, with its sign and two digits."""
    return ("+" if value > 0 else "") + show(float(f"{value:.2g}"))


def show_params(params: Mapping[str, Any], paths: Sequence[str]) -> str:
    """`beta=2 gamma=0.5 learning_rate=6e-7`, only the leaves that this trial has."""
    short = short_names(paths)
    return " ".join(f"{short[p]}={show(params[p])}" for p in paths if p in params)
