"""`Requirement`: a bound on a held-out metric that a trial must keep to be the best, as `require` in a sweep file.

The bound is a number or relative to the initial model: `eval_exact_answers: ">= initial"`,
`eval_logps_per_token/chosen: ">= initial - 0.2"`, `eval_repetition: "<= 0.1"`. A violation is the amount by which a
trial misses the bound, in the metric's units and at most 0 if it keeps it: the sign of Optuna's constraints.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, Self

from orchestrator.spec.objectives import ALTERNATIVES, MessageAndHint, check_metric
from trainer.config.base import FrozenModel, NonEmptyStr
from trainer.metrics import EXACT_ANSWERS, lookup, scaled_by

_NUMBER = r"(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_FORM = re.compile(rf"(>=|<=)\s*(?:(initial)(?:\s*([+-])\s*({_NUMBER}))?|(-?{_NUMBER}))")
BOUND_PATTERN = rf"^\s*{_FORM.pattern}\s*$"
"""Of JSON Schema."""
RIGHT_FORM = '">= initial", ">= initial - 0.2" or "<= 0.1"'


class Requirement(FrozenModel):
    """A bound on a held-out metric at a trial's end."""

    metric: NonEmptyStr
    comparison: Literal[">=", "<="]
    bound: float
    """A value of the metric, or the difference from the initial model's value."""
    relative_to_initial: bool

    @classmethod
    def parse(cls, metric: str, text: str) -> Self:
        """Return the requirement that `text` states, such as ">= initial - 0.2". Raises ValueError."""
        found = _FORM.fullmatch(text.strip())
        if found is None:
            raise ValueError(f"must be a bound such as {RIGHT_FORM}")
        comparison, initial, sign, difference, number = found.groups()
        bound = float(number if initial is None else f"{sign or ''}{difference or 0}")
        if not math.isfinite(bound):
            raise ValueError("must be a finite number")
        return cls.model_validate(
            {"metric": metric, "comparison": comparison, "bound": bound, "relative_to_initial": initial is not None}
        )

    @property
    def bound_text(self) -> str:
        """The bound as in a sweep file, such as ">= initial - 0.2"."""
        if not self.relative_to_initial:
            return f"{self.comparison} {self.bound!r}"
        difference = f" {'-' if self.bound < 0 else '+'} {abs(self.bound)!r}" if self.bound else ""
        return f"{self.comparison} initial{difference}"

    @property
    def name(self) -> str:
        """Metric and bound, under which the study stores violations: "eval_exact_answers >= initial"."""
        return f"{self.metric} {self.bound_text}"

    def violation(self, metrics: Mapping[str, float], initial: Mapping[str, float]) -> float:
        """Return by how much the metrics miss the bound, in the metric's units; infinity if either was not measured.

        Args:
            metrics: A trial's last value of each metric.
            initial: The initial model's.
        """
        value = metrics.get(self.metric, math.nan)
        bound = self.bound + initial.get(self.metric, math.nan) if self.relative_to_initial else self.bound
        missed = bound - value if self.comparison == ">=" else value - bound
        return missed if math.isfinite(missed) else math.inf


def find_violations(
    requirements: Iterable[Requirement], metrics: Mapping[str, float], initial: Mapping[str, float]
) -> dict[str, float]:
    """Return the violation of each requirement by its name."""
    return {requirement.name: requirement.violation(metrics, initial) for requirement in requirements}


def describe_break(name: str, violation: float, metrics: Mapping[str, float]) -> str:
    """Return a violation above 0 as value and bound: "eval_exact_answers 0.25 < 0.39".

    `name`: the requirement's; `metrics`: the values that were compared.
    """
    metric, comparison, _ = name.split(" ", 2)
    value = metrics.get(metric)
    if value is None or not math.isfinite(violation):
        return f"{metric} was not measured"
    above = comparison == ">="
    return f"{metric} {value:.4g} {'<' if above else '>'} {value + violation if above else value - violation:.4g}"


def check_required_metric(metric: str, searched: Sequence[str]) -> MessageAndHint | None:
    """Return why no bound can be set on `metric` where the settings `searched` differ; None if one can."""
    known = lookup(metric)
    problem = check_metric(metric, (known and known.better) or "maximize", ())
    if problem is None and (scaling := scaled_by(metric, searched)):
        fit = [m for m in (*ALTERNATIVES, EXACT_ANSWERS) if not scaled_by(m, scaling)]
        return (
            f"{metric} is scaled by the search ({', '.join(scaling)}), so a bound means something else in each trial",
            f"use {', '.join(fit)}",
        )
    return problem
