"""`Requirement`: a bound on a held-out metric that a trial must keep to be the best, as `require` in a sweep file.

The bound is a number or relative to the initial model: `eval_exact_answers: ">= initial"`,
`eval_logps_per_token/chosen: ">= initial - 0.2"`, `eval_answer_length: "<= 2 * initial"`, `eval_repetition: "<= 0.1"`.
`DEFAULT_BOUNDS` are those of every sweep whose file says nothing else about their metric. A violation is the amount by
which a trial misses the bound, in the metric's units and at most 0 if it keeps it: the sign of Optuna's constraints.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, Self

from pydantic import SerializerFunctionWrapHandler, model_serializer

from orchestrator.spec.objectives import (
    ALTERNATIVES,
    MessageAndHint,
    check_completion_metric,
    check_metric,
    eval_rows_have_answers,
)
from trainer.config.base import FrozenModel, NonEmptyStr
from trainer.config.trial import TrialConfig
from trainer.metrics import ANSWER_LENGTH, CHOSEN, EXACT_ANSWERS, REPETITION, lookup, scaled_by

DEFAULT_BOUNDS = {
    # ln 2: each chosen token half as likely. The chosen log-prob falls in good runs too, by 0.3 on the quickstart's
    # model; far below, probability moves to other texts than the chosen (arXiv 2402.13228, 2410.08847).
    CHOSEN: ">= initial - 0.7",
    # Share of repeated 4-grams, as seq-rep-4 of arXiv 1908.04319; greedy text that loops has degenerated (1904.09751).
    REPETITION: "<= initial + 0.1",
    # Preference tuning can make answers far longer than those of its data (arXiv 2403.19159); Gemma-2's grew 1.3 times.
    ANSWER_LENGTH: "<= 2 * initial",
    # The alignment tax (arXiv 2203.02155): preferences gained, the task forgotten. 0.05 is about the standard error of
    # a difference on 64 prompts of which a fifth changes.
    EXACT_ANSWERS: ">= initial - 0.05",
}
"""The bounds that guard a sweep by default, by metric; only those that it measures count."""
OFF = "off"
"""What turns a default bound off, or all of them."""

_NUMBER = r"(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_FORM = re.compile(rf"(>=|<=)\s*(?:(?:({_NUMBER})\s*\*\s*)?(initial)(?:\s*([+-])\s*({_NUMBER}))?|(-?{_NUMBER}))")
BOUND_PATTERN = rf"^\s*{_FORM.pattern}\s*$"
"""Of JSON Schema."""
_ROUNDING = 1e-9
"""Relative difference of a value from its bound that is rounding."""
RIGHT_FORM = '">= initial", ">= initial - 0.2", "<= 2 * initial" or "<= 0.1"'


class Requirement(FrozenModel):
    """A bound on a held-out metric at a trial's end."""

    metric: NonEmptyStr
    comparison: Literal[">=", "<="]
    bound: float
    """A value of the metric, or the difference from the initial model's value."""
    relative_to_initial: bool
    factor: float = 1.0
    """What the initial model's value is multiplied by before the difference is added."""

    @model_serializer(mode="wrap")
    def _without_usual_factor(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave `factor` out where it is 1: the stored text of sweeps of before there was one stays the same."""
        tree: dict[str, Any] = handler(self)
        if self.factor == 1.0:
            tree.pop("factor", None)
        return tree

    @classmethod
    def parse(cls, metric: str, text: str) -> Self:
        """Return the requirement that `text` states, such as ">= initial - 0.2". Raises ValueError."""
        found = _FORM.fullmatch(text.strip())
        if found is None:
            raise ValueError(f"must be a bound such as {RIGHT_FORM}")
        comparison, factor, initial, sign, difference, number = found.groups()
        bound = float(number if initial is None else f"{sign or ''}{difference or 0}")
        times = float(factor or 1)
        if not math.isfinite(bound) or not math.isfinite(times):
            raise ValueError("must be a finite number")
        made = {"metric": metric, "comparison": comparison, "bound": bound, "relative_to_initial": initial is not None}
        return cls.model_validate(made | {"factor": times})

    @property
    def bound_text(self) -> str:
        """The bound as in a sweep file, such as ">= initial - 0.2"."""
        if not self.relative_to_initial:
            return f"{self.comparison} {self.bound!r}"
        difference = f" {'-' if self.bound < 0 else '+'} {abs(self.bound)!r}" if self.bound else ""
        times = "" if self.factor == 1.0 else f"{f'{self.factor!r}'.removesuffix('.0')} * "
        return f"{self.comparison} {times}initial{difference}"

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
        start = self.factor * initial.get(self.metric, math.nan) if self.relative_to_initial else 0.0
        bound = self.bound + start
        missed = bound - value if self.comparison == ">=" else value - bound
        if abs(missed) <= _ROUNDING * max(abs(bound), abs(value), 1.0):
            return 0.0  # 0.4 - 0.05 is above 0.35 in floating point
        return missed if math.isfinite(missed) else math.inf


def default_requirements(base: TrialConfig) -> tuple[Requirement, ...]:
    """Return `DEFAULT_BOUNDS` of the metrics that trials of this base certainly measure."""
    metrics = [metric for metric in DEFAULT_BOUNDS if check_completion_metric(metric, base.evaluation) is None]
    if not eval_rows_have_answers(base.data, if_unknown=False):
        metrics = [metric for metric in metrics if metric != EXACT_ANSWERS]
    return tuple(Requirement.parse(metric, DEFAULT_BOUNDS[metric]) for metric in metrics)


def written_bounds(requirements: Sequence[Requirement]) -> dict[str, str | list[str]]:
    """Return `require` as in a sweep file: bounds by metric, and `off` for those of `DEFAULT_BOUNDS` without one."""
    out: dict[str, str | list[str]] = {}
    for metric in dict.fromkeys([*(requirement.metric for requirement in requirements), *DEFAULT_BOUNDS]):
        bounds = [requirement.bound_text for requirement in requirements if requirement.metric == metric]
        out[metric] = bounds if len(bounds) > 1 else bounds[0] if bounds else OFF
    return out


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
    bound = value + violation if above else value - violation
    digits = next((n for n in range(4, 17) if f"{value:.{n}g}" != f"{bound:.{n}g}"), 17)
    return f"{metric} {value:.{digits}g} {'<' if above else '>'} {bound:.{digits}g}"


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
