"""The guard against divergence: when a trial is beyond saving, in words with the numbers.

A pure function of the trial's points by step: given again, or in other batches, they lead to the same verdict at the
same step. The trial ends there; what it reported after that step does not count, however early it arrived.

The guard's rules: each sees a trial's points once, in order, and says in words when the trial is beyond saving.
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
from trainer.results import GO_ON, Point, Verdict

_LEAST_FALL = 1.0
"""Nats per token that must be lost before a low log-prob counts: a raw model begins low."""
_GENTLER = "lower training.learning_rate"


class Rule(Protocol):
    """One rule watching one trial."""

    def see(self, point: Point) -> str:
        """Take the next point; why the trial must stop there, or nothing."""
        ...


def rules(config: GuardConfig) -> list[Rule]:
    """Fresh rules, the most telling first."""
    found: list[Rule] = []
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

    def see(self, point: Point) -> str:
        loss = point.metrics.get("loss")
        if not self._trained:
            self._start = max(self._start, *(point.metrics.get(n, -math.inf) for n in ("loss", f"{EVAL}loss")))
        if loss is None:
            return ""
        self._trained = True
        limit = self._start + (self._config.ratio - 1.0) * abs(self._start)
        updates = self._streak.length(point.step, loss > limit)
        if updates < self._config.updates:
            return ""
        return (
            f"the loss was above {self._config.ratio:g} times its start ({self._start:.3g}) for {updates} updates, "
            f"and is {loss:.3g} at update {point.step}; {_GENTLER}"
        )


class _GradNorm:
    def __init__(self, config: GradNormRule) -> None:
        self._config, self._streak = config, _Streak()
        self._calm: list[float] = []

    def see(self, point: Point) -> str:
        norm = point.metrics.get("grad_norm")
        if norm is None:
            return ""
        limit, why = self._limit()
        updates = self._streak.length(point.step, norm > limit)
        if updates == 0:
            insort(self._calm, norm)  # the norms of an explosion must not move what it is measured by
        if updates < self._config.updates:
            return ""
        return (
            f"the gradient's norm was above {why} for {updates} updates, and is {norm:.3g} at update {point.step}; "
            f"{_GENTLER} or lengthen training.warmup_ratio"
        )

    def _limit(self) -> tuple[float, str]:
        config = self._config
        limit = math.inf if config.above is None else config.above
        why = f"{limit:g}"
        if config.times_median is not None and len(self._calm) >= config.after:
            middle = median(self._calm)
            if config.times_median * middle < limit:
                return config.times_median * middle, f"{config.times_median:g} times its median ({middle:.3g})"
        return limit, why


@dataclass(slots=True)
class _Start:
    logp: float
    margin: float


class _ChosenLogps:
    """`prefix` says on which pairs; the start is the lower of the first value there and the start model's."""

    def __init__(self, config: ChosenLogpsRule, prefix: str) -> None:
        self._config, self._prefix, self._streak = config, prefix, _Streak()
        self._updates = 1 if prefix == EVAL else config.updates
        self._model: _Start | None = None
        self._start: _Start | None = None

    def see(self, point: Point) -> str:
        if self._model is None:
            self._model = _start(point, EVAL)
        now = _start(point, self._prefix)
        if now is None:
            return ""
        if self._start is None:
            model = self._model or now
            self._start = _Start(min(now.logp, model.logp), max(now.margin, model.margin))
        start, config = self._start, self._config
        fall, rises = start.logp - now.logp, now.margin > start.margin
        floor = config.lowest is not None and now.logp <= config.lowest and fall >= _LEAST_FALL
        alone = config.fall_alone is not None and fall >= config.fall_alone
        beside = config.fall is not None and fall >= config.fall and rises
        if self._streak.length(point.step, floor or alone or beside) < self._updates:
            return ""
        which = "held-out chosen" if self._prefix == EVAL else "chosen"
        margin = f"from {start.margin:.2f} to {now.margin:.2f}"
        beyond = f", below {config.lowest:g}," if floor else ""
        return (
            f"the {which} log-prob fell from {start.logp:.2f} to {now.logp:.2f} per token{beyond} by update "
            f"{point.step} while the margin {'rose' if rises else 'went'} {margin}; {_GENTLER}, raise loss.beta or add "
            "loss.nll_scale"
        )


def _start(point: Point, prefix: str) -> _Start | None:
    logp, margin = (point.metrics.get(f"{prefix}{n}") for n in ("logps_per_token/chosen", "margins/logp"))
    return None if logp is None else _Start(logp, 0.0 if margin is None else margin)


class _Repetition:
    def __init__(self, config: RepetitionRule) -> None:
        self._config, self._looks = config, 0
        self._start: float | None = None

    def see(self, point: Point) -> str:
        share = point.metrics.get(f"{EVAL}repetition")
        if share is None:
            return ""
        self._start = share if self._start is None else self._start
        self._looks = self._looks + 1 if share - self._start >= self._config.rise else 0
        if self._looks < self._config.looks:
            return ""
        return (
            f"{share:.0%} of the 4-grams in the answers to the fixed prompts are repetitions by update {point.step} "
            f"({self._start:.0%} at the start), at {self._looks} looks in a row; {_GENTLER}, raise loss.beta or add "
            "loss.nll_scale"
        )


class _AnswerLength:
    def __init__(self, config: AnswerLengthRule) -> None:
        self._config, self._looks = config, 0
        self._start: float | None = None
        self._usual = 0.0

    def see(self, point: Point) -> str:
        length = point.metrics.get(f"{EVAL}answer_length")
        if length is None:
            return ""
        if self._start is None:
            self._start = length
            self._usual = max(length, point.metrics.get(f"{EVAL}lengths/chosen", 0.0))
        self._looks = self._looks + 1 if length > self._config.ratio * self._usual else 0
        if self._looks < self._config.looks:
            return ""
        return (
            f"the answers to the fixed prompts have {length:.3g} tokens by update {point.step} ({self._start:.3g} at "
            f"the start; chosen responses and the start have at most {self._usual:.3g}), at {self._looks} looks in a "
            f"row; {_GENTLER} or raise loss.beta"
        )


ALWAYS = ("loss", "grad_norm", f"{EVAL}loss")
"""Metrics whose loss of finiteness ends a trial: nothing after it can be trusted. So does a goal's."""


def as_number(value: Any) -> float:
    """The value as a float; what is no number at all becomes NaN, never 0."""
    return float(value) if isinstance(value, (int, float)) else math.nan


def judge(config: GuardConfig, goal: str, points: Iterable[Point]) -> Verdict:
    """The verdict on a trial with these points. `goal` is the metric the sweep is ranked by."""
    guard = Guard(config, goal)
    guard.see(points)
    return guard.verdict


class Guard:
    """Watches one trial. `verdict` stays once it is to stop; `last` is the step that it was given at."""

    def __init__(self, config: GuardConfig, *goals: str) -> None:
        self._watched = dict.fromkeys((*ALWAYS, *goals))
        self._rules = rules(config)
        self._seen = -1
        self.verdict = GO_ON

    def see(self, points: Iterable[Point]) -> list[Point]:
        """Take points, in any order within the call, and return those that count: none beyond the trial's end.

        A step seen before changes nothing. Values that are no numbers come back as NaN.
        """
        counted: list[Point] = []
        for point in sorted(points, key=lambda p: p.step):
            if point.step > self._seen:
                if self.verdict.stop:
                    break
                self._seen = point.step
                if reason := self._reason(point):
                    self.verdict = Verdict(stop=True, reason=reason, diverged=True)
            numbers = {name: as_number(value) for name, value in point.metrics.items()}
            counted.append(replace(point, metrics=numbers))
        return counted

    def _reason(self, point: Point) -> str:
        if strange := _not_numbers(point.metrics):
            return f"diverged: {strange} at step {point.step} is not a number"
        for name in self._watched:
            value = point.metrics.get(name)
            if value is not None and not math.isfinite(value):
                return f"diverged: {name} is {value} at step {point.step}"
        # Each rule sees each point, also where another one has spoken.
        said = [why for rule in self._rules if (why := rule.see(point))]
        return f"diverged: {said[0]}" if said else ""


def _not_numbers(metrics: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in metrics.items() if not isinstance(value, (int, float)))
