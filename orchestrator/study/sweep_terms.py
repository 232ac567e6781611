"""What was settled when the sweep began and holds whoever resumes it, on whatever machine.

Two specs of one sweep: whether they are the same, and what may change while it goes on.

What a sweep has spent of its budget, and whether that ends it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from orchestrator.errors import SpecChanged, TooManySlots
from orchestrator.spec.pruners import compares
from orchestrator.spec.samplers import Asap, Learner
from orchestrator.spec.sweep_spec import Budget, Goal, SweepSpec
from orchestrator.study.trial_records import TrialState
from orchestrator.study.trial_snapshots import Known
from trainer.config.trial import flatten

SETTLED = "settled"
"""Where it stands among the study's attributes."""
LAGS = 2
"""Times the slots: how many trials later a result may be used, where the file does not say."""


@dataclass(frozen=True, slots=True)
class Settled:
    """`lag`: trial n knows trials up to n - lag, None in `order: asap`; `train_pairs`: None where nobody counted."""

    lag: int | None = LAGS
    train_pairs: int | None = None
    earlier: tuple[Known, ...] = ()

    @classmethod
    def of(cls, spec: SweepSpec, slots: int, train_pairs: int | None, earlier: Sequence[Known]) -> Self:
        """For a sweep that begins with so many trials at a time."""
        lag = None if isinstance(spec.order, Asap) else spec.order.lag or LAGS * slots
        made = cls(lag, train_pairs, tuple(earlier))
        made.admit(spec, slots)
        return made

    def admit(self, spec: SweepSpec, slots: int) -> None:
        """Refuse more trials at a time than the rule leaves room for."""
        matters = isinstance(spec.sampler, Learner) or compares(spec.pruner)
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
                "step": max(t.course, default=0),
                "diverged": t.diverged,
            }
            for t in self.earlier
        ]
        return {"lag": self.lag, "train_pairs": self.train_pairs, "earlier": earlier}

    @classmethod
    def from_json(cls, kept: Mapping[str, Any]) -> Self:
        """From the database."""
        earlier = [
            Known(
                number=t["number"],
                params=t["params"],
                state=TrialState(t["state"]),
                values=None if t["values"] is None else tuple(float(v) for v in t["values"]),
                course={} if t["values"] is None else {t["step"]: float(t["values"][0])},
                diverged=t["diverged"],
            )
            for t in kept["earlier"]
        ]
        return cls(kept["lag"], kept["train_pairs"], tuple(earlier))


MAY_CHANGE = ("budget", "resources", "tracking", "notify", "judge", "keep_models", "description", "mirror")
"""Parts of a spec on which no trial's result depends."""


@dataclass(frozen=True, slots=True)
class Change:
    """A leaf of the spec that differs."""

    path: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.path}: {_shown(self.old)} -> {_shown(self.new)}"


def digest(spec: SweepSpec) -> str:
    """The sweep's identity: equal for equal specs, however they were written."""
    return hashlib.sha256(json.dumps(spec.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()


def differences(old: SweepSpec, new: SweepSpec) -> list[Change]:
    """Every leaf that differs, by path."""
    before, after = flatten(old.model_dump(mode="json")), flatten(new.model_dump(mode="json"))
    paths = sorted(p for p in before.keys() | after.keys() if before.get(p, ...) != after.get(p, ...))
    return [Change(path, before.get(path), after.get(path)) for path in paths]


def changes(old: SweepSpec, new: SweepSpec) -> list[Change]:
    """The leaves that differ; refuses those that would make the trials incomparable."""
    found = differences(old, new)
    fixed = [change for change in found if change.path.split(".")[0] not in MAY_CHANGE]
    if fixed:
        raise SpecChanged(new.name, [c.path for c in fixed], [str(c) for c in fixed], MAY_CHANGE)
    return found


def _shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


@dataclass(frozen=True, slots=True)
class Spent:
    """Of all drivers and all attempts so far."""

    hours: float
    """Wall-clock of the drivers, by the monotonic clock; time in which the whole sweep was paused is left out."""
    gpu_hours: float
    """GPUs of each attempt's slot times its hours; where there are no GPUs, slot-hours."""


def overspent(budget: Budget, spent: Spent) -> str:
    """Which part of the budget of time is used up, in words; empty while none is."""
    if budget.hours is not None and spent.hours >= budget.hours:
        return f"{spent.hours:.3g} of {budget.hours:g} hours spent"
    if budget.gpu_hours is not None and spent.gpu_hours >= budget.gpu_hours:
        return f"{spent.gpu_hours:.3g} of {budget.gpu_hours:g} gpu_hours spent"
    return ""


def reached(budget: Budget, goal: Goal, value: float | None) -> bool:
    """Whether a complete trial with this value of the goal is what the sweep was looking for."""
    if budget.target is None or value is None or not math.isfinite(value):
        return False
    return value >= budget.target if goal.direction == "maximize" else value <= budget.target
