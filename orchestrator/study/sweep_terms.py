"""`SweepTerms`: what is fixed when a sweep begins and binds every driver; spec changes; budget spent.

`spec_differences` and `allowed_changes` compare two specs of one sweep. `Usage` and `budget_exceeded`: what a sweep has
spent, and whether that ends it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from orchestrator.errors import SpecChanged, TooManySlots
from orchestrator.spec.objectives import Objective
from orchestrator.spec.pruners import depends_on_other_trials
from orchestrator.spec.samplers import AdaptiveSampler, Asap
from orchestrator.spec.sweep_spec import Budget, SweepSpec
from orchestrator.study.trial_records import TrialState
from orchestrator.study.trial_snapshots import TrialSnapshot
from trainer.config.trial import flatten

TERMS_KEY = "settled"
"""Where it stands among the study's attributes."""
LAG_PER_SLOT = 2
"""Times the slots: how many trials later a result may be used, where the file does not say."""


@dataclass(frozen=True, slots=True)
class SweepTerms:
    """`lag`: trial n knows trials up to n - lag, None in `order: asap`; `train_pairs`: None where nobody counted."""

    lag: int | None = LAG_PER_SLOT
    train_pairs: int | None = None
    earlier: tuple[TrialSnapshot, ...] = ()

    @classmethod
    def create(cls, spec: SweepSpec, slots: int, train_pairs: int | None, earlier: Sequence[TrialSnapshot]) -> Self:
        """For a sweep that begins with so many trials at a time."""
        lag = None if isinstance(spec.order, Asap) else spec.order.lag or LAG_PER_SLOT * slots
        made = cls(lag, train_pairs, tuple(earlier))
        made.check_concurrency(spec, slots)
        return made

    def check_concurrency(self, spec: SweepSpec, slots: int) -> None:
        """Refuse more trials at a time than the rule leaves room for."""
        matters = isinstance(spec.sampler, AdaptiveSampler) or depends_on_other_trials(spec.pruner)
        if matters and self.lag is not None and slots > self.lag:
            raise TooManySlots(slots, self.lag)

    def as_json(self) -> dict[str, Any]:
        """For the database."""
        earlier = [
            {
                "number": t.number,
                "params": dict(t.params),
                "state": t.state.value,
                "values": None if t.values is None else [str(v) for v in t.values],
                "step": max(t.curve, default=0),
                "diverged": t.diverged,
            }
            for t in self.earlier
        ]
        return {"lag": self.lag, "train_pairs": self.train_pairs, "earlier": earlier}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Self:
        """From the database."""
        earlier = [
            TrialSnapshot(
                number=t["number"],
                params=t["params"],
                state=TrialState(t["state"]),
                values=None if t["values"] is None else tuple(float(v) for v in t["values"]),
                curve={} if t["values"] is None else {t["step"]: float(t["values"][0])},
                diverged=t["diverged"],
            )
            for t in stored["earlier"]
        ]
        return cls(stored["lag"], stored["train_pairs"], tuple(earlier))


AMENDABLE = ("budget", "resources", "tracking", "notify", "judge", "keep_models", "description", "mirror")
"""Parts of a spec on which no trial's result depends."""


@dataclass(frozen=True, slots=True)
class Change:
    """A setting of the spec that differs."""

    path: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.path}: {_format_change(self.old)} -> {_format_change(self.new)}"


def spec_digest(spec: SweepSpec) -> str:
    """The sweep's identity: equal for equal specs, however they were written."""
    return hashlib.sha256(json.dumps(spec.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()


def spec_differences(old: SweepSpec, new: SweepSpec) -> list[Change]:
    """Every setting that differs, by path."""
    before, after = flatten(old.model_dump(mode="json")), flatten(new.model_dump(mode="json"))
    paths = sorted(p for p in before.keys() | after.keys() if before.get(p, ...) != after.get(p, ...))
    return [Change(path, before.get(path), after.get(path)) for path in paths]


def allowed_changes(old: SweepSpec, new: SweepSpec) -> list[Change]:
    """The settings that differ; refuses those that would make the trials incomparable."""
    found = spec_differences(old, new)
    fixed = [change for change in found if change.path.split(".")[0] not in AMENDABLE]
    if fixed:
        raise SpecChanged(new.name, [c.path for c in fixed], [str(c) for c in fixed], AMENDABLE)
    return found


def _format_change(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


@dataclass(frozen=True, slots=True)
class Usage:
    """Of all drivers and all attempts so far."""

    hours: float
    """Wall-clock of the drivers, by the monotonic clock; time in which the whole sweep was paused is left out."""
    gpu_hours: float
    """GPUs of each attempt's slot times its hours; where there are no GPUs, slot-hours."""


def budget_exceeded(budget: Budget, usage: Usage) -> str:
    """Which part of the budget of time is used up, in words; empty while none is."""
    if budget.hours is not None and usage.hours >= budget.hours:
        return f"{usage.hours:.3g} of {budget.hours:g} hours spent"
    if budget.gpu_hours is not None and usage.gpu_hours >= budget.gpu_hours:
        return f"{usage.gpu_hours:.3g} of {budget.gpu_hours:g} gpu_hours spent"
    return ""


def target_reached(budget: Budget, objective: Objective, value: float | None) -> bool:
    """Whether a complete trial with this value of the objective is what the sweep was looking for."""
    if budget.target is None or value is None or not math.isfinite(value):
        return False
    return value >= budget.target if objective.direction == "maximize" else value <= budget.target
