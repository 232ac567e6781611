"""`DivergenceGuard`: stops a trial that has diverged, with the reason in words and numbers; and the guard's rules.

Each rule sees a trial's metrics once, in order. The decision is a pure function of the metrics by step: repeated or
differently batched reports give the same decision at the same step. The trial ends at that step; later metrics do not
count, however early they arrived.
"""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
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
from trainer.metrics import EVAL
from trainer.results import CONTINUE, StepMetrics, StopDecision

_MIN_FALL = 1.0
"""Nats per token that must be lost before a low log-prob counts: a raw model begins low."""
_LOWER_LR_ADVICE = "lower training.learning_rate"


class GuardRule(Protocol):
    """One rule watching one trial."""

    def update(self, step_metrics: StepMetrics) -> str:
        """Take the next point; why the trial must stop there, or nothing."""
        ...


def make_rules(config: GuardConfig) -> list[GuardRule]:
    """Fresh rules, the most telling first."""
    found: list[GuardRule] = []
    if config.chosen_logps is not None:
        found += [_ChosenLogps(config.chosen_logps, EVAL), _ChosenLogps(config.chosen_logps, "")]
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
    """For how many updates something has held without a break."""

    def __init__(self) -> None:
        self._since: int | None = None

    def length(self, step: int, holds: bool) -> int:
        if not holds:
            self._since = None
            return 0
        self._since = step if self._since is None else self._since
        return step - self._since + 1


class _Loss:
    def __init__(self, config: LossRule) -> None:
        self._config, self._streak = config, _Streak()
        self._start = -math.inf
        self._trained = False

    def update(self, step_metrics: StepMetrics) -> str:
        loss = step_metrics.metrics.get("loss")
        if not self._trained:
            self._start = max(self._start, *(step_metrics.metrics.get(n, -math.inf) for n in ("loss", f"{EVAL}loss")))
        if loss is None:
            return ""
        self._trained = True
        limit = self._start + (self._config.ratio - 1.0) * abs(self._start)
        updates = self._streak.length(step_metrics.step, loss > limit)
        if updates < self._config.updates:
            return ""
        return (
            f"the loss was above {self._config.ratio:g} times its start ({self._start:.3g}) for {updates} updates, "
            f"and is {loss:.3g} at update {step_metrics.step}; {_LOWER_LR_ADVICE}"
        )


class _GradNorm:
    def __init__(self, config: GradNormRule) -> None:
        self._config, self._streak = config, _Streak()
        self._calm: list[float] = []

    def update(self, step_metrics: StepMetrics) -> str:
        norm = step_metrics.metrics.get("grad_norm")
        if norm is None:
            return ""
        limit, reason = self._limit()
        updates = self._streak.length(step_metrics.step, norm > limit)
        if updates == 0:
            insort(self._calm, norm)  # the norms of an explosion must not move what it is measured by
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
        if config.times_median is not None and len(self._calm) >= config.after:
            middle = median(self._calm)
            if config.times_median * middle < limit:
                return config.times_median * middle, f"{config.times_median:g} times its median ({middle:.3g})"
        return limit, reason


@dataclass(slots=True)
class _InitialValues:
    logp: float
    margin: float


class _ChosenLogps:
    """`prefix` says on which pairs; the start is the lower of the first value there and the initial model's."""

    def __init__(self, config: ChosenLogpsRule, prefix: str) -> None:
        self._config, self._prefix, self._streak = config, prefix, _Streak()
        self._updates = 1 if prefix == EVAL else config.updates
        self._model: _InitialValues | None = None
        self._start: _InitialValues | None = None

    def update(self, step_metrics: StepMetrics) -> str:
        if self._model is None:
            self._model = _initial_values(step_metrics, EVAL)
        now = _initial_values(step_metrics, self._prefix)
        if now is None:
            return ""
        if self._start is None:
            model = self._model or now
            self._start = _InitialValues(min(now.logp, model.logp), max(now.margin, model.margin))
        start, config = self._start, self._config
        fall, rises = start.logp - now.logp, now.margin > start.margin
        floor = config.lowest is not None and now.logp <= config.lowest and fall >= _MIN_FALL
        alone = config.fall_alone is not None and fall >= config.fall_alone
        alongside = config.fall is not None and fall >= config.fall and rises
        if self._streak.length(step_metrics.step, floor or alone or alongside) < self._updates:
            return ""
        which = "held-out chosen" if self._prefix == EVAL else "chosen"
        margin = f"from {start.margin:.2f} to {now.margin:.2f}"
        beyond = f", below {config.lowest:g}," if floor else ""
        return (
            f"the {which} log-prob fell from {start.logp:.2f} to {now.logp:.2f} per token{beyond} by update "
            f"{step_metrics.step} while the margin {'rose' if rises else 'went'} {margin}; {_LOWER_LR_ADVICE}, raise "
            "loss.beta or add loss.nll_scale"
        )


def _initial_values(step_metrics: StepMetrics, prefix: str) -> _InitialValues | None:
    logp, margin = (step_metrics.metrics.get(f"{prefix}{n}") for n in ("logps_per_token/chosen", "margins/logp"))
    return None if logp is None else _InitialValues(logp, 0.0 if margin is None else margin)


class _Repetition:
    def __init__(self, config: RepetitionRule) -> None:
        self._config, self._looks = config, 0
        self._start: float | None = None

    def update(self, step_metrics: StepMetrics) -> str:
        share = step_metrics.metrics.get(f"{EVAL}repetition")
        if share is None:
            return ""
        self._start = share if self._start is None else self._start
        self._looks = self._looks + 1 if share - self._start >= self._config.rise else 0
        if self._looks < self._config.looks:
            return ""
        return (
            f"{share:.0%} of the 4-grams in the answers to the fixed prompts are repetitions by update "
            f"{step_metrics.step} ({self._start:.0%} at the start), at {self._looks} looks in a row; "
            f"{_LOWER_LR_ADVICE}, raise loss.beta or add loss.nll_scale"
        )


class _AnswerLength:
    def __init__(self, config: AnswerLengthRule) -> None:
        self._config, self._looks = config, 0
        self._start: float | None = None
        self._usual = 0.0

    def update(self, step_metrics: StepMetrics) -> str:
        length = step_metrics.metrics.get(f"{EVAL}answer_length")
        if length is None:
            return ""
        if self._start is None:
            self._start = length
            self._usual = max(length, step_metrics.metrics.get(f"{EVAL}lengths/chosen", 0.0))
        self._looks = self._looks + 1 if length > self._config.ratio * self._usual else 0
        if self._looks < self._config.looks:
            return ""
        return (
            f"the answers to the fixed prompts have {length:.3g} tokens by update {step_metrics.step} "
            f"({self._start:.3g} at the start; chosen responses and the start have at most {self._usual:.3g}), "
            f"at {self._looks} looks in a row; {_LOWER_LR_ADVICE} or raise loss.beta"
        )


ALWAYS_FINITE = ("loss", "grad_norm", f"{EVAL}loss")
"""Metrics whose loss of finiteness ends a trial: nothing after it can be trusted. So does an objective's."""


def as_number(value: Any) -> float:
    """The value as a float; what is no number at all becomes NaN, never 0."""
    return float(value) if isinstance(value, (int, float)) else math.nan


class DivergenceGuard:
    """Watches one trial. `decision` stays once it is to stop; `last` is the step that it was given at."""

    def __init__(self, config: GuardConfig, *metrics: str) -> None:
        self._watched = dict.fromkeys((*ALWAYS_FINITE, *metrics))
        self._rules = make_rules(config)
        self._seen = -1
        self.decision = CONTINUE

    def update(self, metrics: Iterable[StepMetrics]) -> list[StepMetrics]:
        """Take points, in any order within the call, and return those that count: none beyond the trial's end.

        A step seen before changes nothing. Values that are no numbers come back as NaN.
        """
        counted: list[StepMetrics] = []
        for step_metrics in sorted(metrics, key=lambda p: p.step):
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
        if strange := _non_finite(step_metrics.metrics):
            return f"diverged: {strange} at step {step_metrics.step} is not a number"
        for name in self._watched:
            value = step_metrics.metrics.get(name)
            if value is not None and not math.isfinite(value):
                return f"diverged: {name} is {value} at step {step_metrics.step}"
        # Each rule sees each point, also where another one has spoken.
        reasons = [reason for rule in self._rules if (reason := rule.update(step_metrics))]
        return f"diverged: {reasons[0]}" if reasons else ""


def _non_finite(metrics: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in metrics.items() if not isinstance(value, (int, float)))
