"""`DivergenceGuard`: stops a trial that has diverged and gives the reason with figures; and the guard's rules.

Each rule gets a trial's metrics once, in order. The decision is a pure function of the metrics by step: repeated or
differently batched reports give the same decision at the same step. The trial ends at that step; later metrics do not
count, whenever they arrived.
"""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from operator import attrgetter
from statistics import median
from typing import Any, Protocol

from orchestrator.spec.guard_config import (
    AnswerLengthRule,
    ChosenLogpsRule,
    GradNormRule,
    GuardConfig,
    LossRule,
    RepetitionRule,
)
from trainer.metrics import EVAL_PREFIX
from trainer.results import CONTINUE, StepMetrics, StopDecision

_MIN_FALL = 1.0
"""Minimum fall (nats per token) before the floor `lowest` applies: an untrained model starts below it."""
_LOWER_LR_ADVICE = "lower training.learning_rate"


class GuardRule(Protocol):
    """One rule of the guard, applied to one trial."""

    def update(self, step_metrics: StepMetrics) -> str:
        """Process the next metrics; return why the trial must stop, or ""."""
        ...


def make_rules(config: GuardConfig) -> list[GuardRule]:
    """Return new rules for one trial, the most specific first."""
    found: list[GuardRule] = []
    if config.chosen_logps is not None:
        found += [_ChosenLogps(config.chosen_logps, EVAL_PREFIX), _ChosenLogps(config.chosen_logps, "")]
    if config.grad_norm is not None:
        found.append(_GradNorm(config.grad_norm))
    if config.loss is not None:
        found.append(_Loss(config.loss))
    if config.repetition is not None:
        found.append(_Repetition(config.repetition))
    if config.answer_length is not None:
        found.append(_AnswerLength(config.answer_length))
    return found


class _Streak:
    """Counts for how many consecutive updates a condition holds."""

    def __init__(self) -> None:
        self._since: int | None = None

    def extend(self, step: int, holds: bool) -> int:
        """Return how many updates up to `step` the condition has held without a break."""
        if not holds:
            self._since = None
            return 0
        self._since = step if self._since is None else self._since
        return step - self._since + 1


class _Loss:
    def __init__(self, config: LossRule) -> None:
        self._config, self._streak = config, _Streak()
        self._initial = -math.inf
        self._trained = False

    def update(self, step_metrics: StepMetrics) -> str:
        """Return the reason if the loss has been too high for long enough."""
        loss = step_metrics.metrics.get("loss")
        if not self._trained:
            self._initial = max(
                self._initial, *(step_metrics.metrics.get(name, -math.inf) for name in ("loss", f"{EVAL_PREFIX}loss"))
            )
        if loss is None:
            return ""
        self._trained = True
        limit = self._initial + (self._config.ratio - 1.0) * abs(self._initial)
        updates = self._streak.extend(step_metrics.step, loss > limit)
        if updates < self._config.updates:
            return ""
        return (
            f"the loss was above {self._config.ratio:g} times its initial value ({self._initial:.3g}) for {updates} "
            f"updates, and is {loss:.3g} at update {step_metrics.step}; {_LOWER_LR_ADVICE}"
        )


class _GradNorm:
    def __init__(self, config: GradNormRule) -> None:
        self._config, self._streak = config, _Streak()
        self._usual_norms: list[float] = []

    def update(self, step_metrics: StepMetrics) -> str:
        """Return the reason if the gradient's norm has been too high for long enough."""
        norm = step_metrics.metrics.get("grad_norm")
        if norm is None:
            return ""
        limit, reason = self._limit()
        updates = self._streak.extend(step_metrics.step, norm > limit)
        if updates == 0:
            insort(self._usual_norms, norm)  # norms above the limit must not raise the median
        if updates < self._config.updates:
            return ""
        return (
            f"the gradient's norm was above {reason} for {updates} updates, and is {norm:.3g} at update "
            f"{step_metrics.step}; {_LOWER_LR_ADVICE} or lengthen training.warmup_ratio"
        )

    def _limit(self) -> tuple[float, str]:
        config = self._config
        limit = math.inf if config.above is None else config.above
        reason = f"{limit:g}"
        if config.times_median is not None and len(self._usual_norms) >= config.after:
            usual_norm = median(self._usual_norms)
            if config.times_median * usual_norm < limit:
                return config.times_median * usual_norm, f"{config.times_median:g} times its median ({usual_norm:.3g})"
        return limit, reason


@dataclass(slots=True)
class _InitialValues:
    logp: float
    margin: float


class _ChosenLogps:
    """`prefix`: held-out or training pairs.

    Baseline: the lower of the first measured log-prob and the initial model's, and the higher of the margins.
    """

    def __init__(self, config: ChosenLogpsRule, prefix: str) -> None:
        self._config, self._prefix, self._streak = config, prefix, _Streak()
        self._updates = 1 if prefix == EVAL_PREFIX else config.updates
        self._initial_model: _InitialValues | None = None
        self._initial: _InitialValues | None = None

    def update(self, step_metrics: StepMetrics) -> str:
        """Return the reason if the chosen responses' log-prob has fallen too far for long enough."""
        if self._initial_model is None:
            self._initial_model = _initial_values(step_metrics, EVAL_PREFIX)
        now = _initial_values(step_metrics, self._prefix)
        if now is None:
            return ""
        if self._initial is None:
            model = self._initial_model or now
            self._initial = _InitialValues(min(now.logp, model.logp), max(now.margin, model.margin))
        initial, config = self._initial, self._config
        fall, rises = initial.logp - now.logp, now.margin > initial.margin
        below_floor = config.lowest is not None and now.logp <= config.lowest and fall >= _MIN_FALL
        fell_far = config.fall_alone is not None and fall >= config.fall_alone
        fell_while_margin_rose = config.fall is not None and fall >= config.fall and rises
        if self._streak.extend(step_metrics.step, below_floor or fell_far or fell_while_margin_rose) < self._updates:
            return ""
        which = "held-out chosen" if self._prefix == EVAL_PREFIX else "chosen"
        margin = f"from {initial.margin:.2f} to {now.margin:.2f}"
        beyond = f", below {config.lowest:g}," if below_floor else ""
        return (
            f"the {which} log-prob fell from {initial.logp:.2f} to {now.logp:.2f} per token{beyond} by update "
            f"{step_metrics.step} while the margin {'rose' if rises else 'went'} {margin}; {_LOWER_LR_ADVICE}, raise "
            "loss.beta or add loss.nll_scale"
        )


def _initial_values(step_metrics: StepMetrics, prefix: str) -> _InitialValues | None:
    logp, margin = (step_metrics.metrics.get(f"{prefix}{name}") for name in ("logps_per_token/chosen", "margins/logp"))
    return None if logp is None else _InitialValues(logp, 0.0 if margin is None else margin)


class _Repetition:
    def __init__(self, config: RepetitionRule) -> None:
        self._config, self._looks = config, 0
        self._initial: float | None = None

    def update(self, step_metrics: StepMetrics) -> str:
        """Return the reason if completions have become too repetitive, in enough consecutive evaluations."""
        share = step_metrics.metrics.get(f"{EVAL_PREFIX}repetition")
        if share is None:
            return ""
        self._initial = share if self._initial is None else self._initial
        self._looks = self._looks + 1 if share - self._initial >= self._config.rise else 0
        if self._looks < self._config.looks:
            return ""
        return (
            f"{share:.0%} of the 4-grams in the completions of the fixed prompts are repetitions by update "
            f"{step_metrics.step} ({self._initial:.0%} at the start), in {self._looks} consecutive evaluations; "
            f"{_LOWER_LR_ADVICE}, raise loss.beta or add loss.nll_scale"
        )


class _AnswerLength:
    def __init__(self, config: AnswerLengthRule) -> None:
        self._config, self._looks = config, 0
        self._initial: float | None = None
        self._reference_length = 0.0

    def update(self, step_metrics: StepMetrics) -> str:
        """Return the reason if completions have become too long, in enough consecutive evaluations."""
        length = step_metrics.metrics.get(f"{EVAL_PREFIX}answer_length")
        if length is None:
            return ""
        if self._initial is None:
            self._initial = length
            self._reference_length = max(length, step_metrics.metrics.get(f"{EVAL_PREFIX}lengths/chosen", 0.0))
        self._looks = self._looks + 1 if length > self._config.ratio * self._reference_length else 0
        if self._looks < self._config.looks:
            return ""
        return (
            f"the completions of the fixed prompts have {length:.3g} tokens by update {step_metrics.step} "
            f"({self._initial:.3g} at the start; chosen responses and initial completions have at most "
            f"{self._reference_length:.3g}), in {self._looks} consecutive evaluations; {_LOWER_LR_ADVICE} or raise "
            "loss.beta"
        )


ALWAYS_FINITE = ("loss", "grad_norm", f"{EVAL_PREFIX}loss")
"""Metrics that end a trial if they are not finite, as do the objectives."""


def as_number(value: Any) -> float:
    """Return the value as a float; NaN if it is not a number."""
    return float(value) if isinstance(value, (int, float)) else math.nan


class DivergenceGuard:
    """The divergence guard of one trial. `metrics`: objectives, which must be finite. A decision to stop is final."""

    def __init__(self, config: GuardConfig, *metrics: str) -> None:
        self._watched = dict.fromkeys((*ALWAYS_FINITE, *metrics))
        self._rules = make_rules(config)
        self._seen = -1
        self.decision = CONTINUE

    def update(self, metrics: Iterable[StepMetrics]) -> list[StepMetrics]:
        """Process metrics, in any order within the call; return those up to the step at which the trial stops.

        A repeated step changes nothing. Values that are not numbers are returned as NaN.
        """
        counted: list[StepMetrics] = []
        for step_metrics in sorted(metrics, key=attrgetter("step")):
            if step_metrics.step > self._seen:
                if self.decision.stop:
                    break
                self._seen = step_metrics.step
                if reason := self._reason(step_metrics):
                    self.decision = StopDecision(stop=True, reason=reason, diverged=True)
            numbers = {name: as_number(value) for name, value in step_metrics.metrics.items()}
            counted.append(replace(step_metrics, metrics=numbers))
        return counted

    def _reason(self, step_metrics: StepMetrics) -> str:
        if not_numbers := _not_numbers(step_metrics.metrics):
            return f"diverged: {not_numbers} at step {step_metrics.step} is not a number"
        for name in self._watched:
            value = step_metrics.metrics.get(name)
            if value is not None and not math.isfinite(value):
                return f"diverged: {name} is {value} at step {step_metrics.step}"
        # Each rule must see all metrics, also if another rule stops the trial.
        reasons = [reason for rule in self._rules if (reason := rule.update(step_metrics))]
        return f"diverged: {reasons[0]}" if reasons else ""


def _not_numbers(metrics: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in metrics.items() if not isinstance(value, (int, float)))
