"""How a trial is doing, seen at one of its evaluations."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from orchestrator.spec.goal import Goal


@dataclass(frozen=True, slots=True)
class Course:
    """A trial's metric by update, up to the evaluation at which it is judged. `updates`: of its whole run, if known."""

    number: int
    values: Mapping[int, float]
    goal: Goal
    updates: int | None

    @property
    def step(self) -> int:
        """The evaluation at which it is judged."""
        return max(self.values)

    @property
    def value(self) -> float:
        """The metric there."""
        return self.values[self.step]

    @property
    def best(self) -> float:
        """The best value so far; NaN where no value is a number."""
        seen = [value for value in self.values.values() if not math.isnan(value)]
        if not seen:
            return math.nan
        return max(seen) if self.goal.direction == "maximize" else min(seen)

    def is_worse(self, a: float, b: float) -> bool:
        """Whether `a` is strictly worse than `b`."""
        return a < b if self.goal.direction == "maximize" else a > b

    @property
    def worse_side(self) -> str:
        """The word for a worse value."""
        return "below" if self.goal.direction == "maximize" else "above"

    def reason(self, what: str) -> str:
        """The sentence of a verdict."""
        return f"pruned at update {self.step}: {what}"


def at_update(amount: float, updates: int | None) -> int | None:
    """An amount as a number of updates: whole numbers are, below 1 it is a share of the run. None: length unknown."""
    if amount >= 1 or amount == 0:
        return int(amount)
    return None if updates is None else max(1, math.ceil(amount * updates - 1e-9))


def show(value: float) -> str:
    """A metric in a sentence."""
    return f"{value:.4g}"
