"""`SweepTerms`: what is fixed when a sweep begins, for all its drivers; allowed changes of the spec; budget used.

`spec_differences` and `allowed_changes` compare two specs of one sweep. `Usage` and `budget_exceeded`: the time a sweep
has used, and whether it exceeds the budget.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from orchestrator.errors import OrchestrateError, SearchNarrowed, SpecChanged, TooManySlots
from orchestrator.spec.objectives import Objective
from orchestrator.spec.pruners import depends_on_other_trials
from orchestrator.spec.requirements import written_bounds
from orchestrator.spec.samplers import AdaptiveSampler, Asap
from orchestrator.spec.sweep_spec import Budget, SweepSpec
from orchestrator.study.search_widening import widening_problems
from orchestrator.study.trial_records import TrialState
from orchestrator.study.trial_snapshots import TrialSnapshot
from trainer.config.locations import is_move
from trainer.config.trial import flatten

TERMS_KEY = "settled"
"""Key among the study's user attributes."""
LAG_PER_SLOT = 2
"""Default lag = this factor times the slots."""


@dataclass(frozen=True, slots=True)
class SweepTerms:
    """What was fixed for all drivers of a sweep when it began.

    `lag`: trial n sees the results of trials up to n - lag, None in `order: asap`; `train_pairs`: None if unknown;
    `warm_start_trials`: trials of the sweep named by `warm_start`; `distinct`: see `SamplingPolicy`, false for sweeps
    of earlier versions, which continue as they began. `prunes_broken`: whether the pruner stops trials that break a
    requirement for good (`broken_evaluations`) and compares with none that did; false for sweeps of earlier versions.
    """

    lag: int | None = LAG_PER_SLOT
    train_pairs: int | None = None
    warm_start_trials: tuple[TrialSnapshot, ...] = ()
    distinct: bool = True
    prunes_broken: bool = True

    @classmethod
    def create(
        cls, spec: SweepSpec, slots: int, train_pairs: int | None, warm_start_trials: Sequence[TrialSnapshot]
    ) -> Self:
        """Return the terms of a sweep that begins with `slots` trials at a time. Raises TooManySlots."""
        lag = None if isinstance(spec.order, Asap) else spec.order.lag or LAG_PER_SLOT * slots
        made = cls(lag, train_pairs, tuple(warm_start_trials))
        made.check_concurrency(spec, slots)
        return made

    def check_concurrency(self, spec: SweepSpec, slots: int) -> None:
        """Raise TooManySlots if the visibility rule does not allow `slots` trials at a time."""
        most = self.most_at_a_time(spec)
        if most is not None and slots > most:
            raise TooManySlots(slots, most)

    def most_at_a_time(self, spec: SweepSpec) -> int | None:
        """Return the most concurrent trials that the visibility rule allows; None for any number."""
        matters = isinstance(spec.sampler, AdaptiveSampler) or depends_on_other_trials(spec.pruner)
        return self.lag if matters else None

    def as_json(self) -> dict[str, Any]:
        """Return the terms as JSON values for the database."""
        stored_trials = [
            {
                "number": trial.number,
                "params": dict(trial.params),
                "state": trial.state.value,
                "values": None if trial.values is None else [str(v) for v in trial.values],
                "step": max(trial.curve, default=0),
                "diverged": trial.diverged,
            }
            | ({"violations": {k: str(v) for k, v in trial.violations.items()}} if trial.violations else {})
            for trial in self.warm_start_trials
        ]
        return {"lag": self.lag, "train_pairs": self.train_pairs, "earlier": stored_trials} | {
            "distinct": self.distinct,
            "prunes_broken": self.prunes_broken,
        }

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Self:
        """Build the terms from the database's JSON values."""
        trials = [
            TrialSnapshot(
                number=trial["number"],
                params=trial["params"],
                state=TrialState(trial["state"]),
                values=None if trial["values"] is None else tuple(float(v) for v in trial["values"]),
                curve={} if trial["values"] is None else {trial["step"]: float(trial["values"][0])},
                diverged=trial["diverged"],
                violations={name: float(v) for name, v in trial.get("violations", {}).items()},
            )
            for trial in stored["earlier"]
        ]
        flags = (stored.get(name, False) for name in ("distinct", "prunes_broken"))
        return cls(stored["lag"], stored["train_pairs"], tuple(trials), *flags)


EARLIEST_TERMS = SweepTerms(distinct=False, prunes_broken=False)
"""Of sweeps that began before terms were stored."""

AMENDABLE = (
    "finalists",
    "budget",
    "resources",
    "tracking",
    "notify",
    "judge",
    "keep_models",
    "description",
    "mirror",
    "require",
)
"""Sections of a spec that no trial's result depends on; with another `require`, ended trials are measured again.

Lists and ranges of `search` may grow (`search_widening`).
"""


@dataclass(frozen=True, slots=True)
class SettingChange:
    """A setting that differs between two specs."""

    path: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.path}: {_format_change(self.old)} -> {_format_change(self.new)}"


def full_spec_digest(spec: SweepSpec) -> str:
    """Return a hex SHA-256 of every setting of the spec; `sweep_identity` covers only what the trials depend on."""
    return hashlib.sha256(json.dumps(spec.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()


def spec_differences(old: SweepSpec, new: SweepSpec) -> list[SettingChange]:
    """Return every setting that differs, sorted by path."""
    before, after = (flatten(spec.written() | {"require": written_bounds(spec.require)}) for spec in (old, new))
    paths = sorted(path for path in before.keys() | after.keys() if before.get(path, ...) != after.get(path, ...))
    return [
        SettingChange(path.replace("search.dimensions.", "search."), before.get(path), after.get(path))
        for path in paths
    ]


class RowsSeen(OrchestrateError):
    """Finalists cannot be added: the search has evaluated on every held-out row. Nothing was changed."""


def allowed_changes(old: SweepSpec, new: SweepSpec) -> list[SettingChange]:
    """Return the settings that differ.

    Files and folders of `base` and `sft` may have other paths; the caller checks that their contents are equal.

    Raises:
        RowsSeen: finalists of a sweep that keeps no held-out rows for them.
        SpecChanged: a change would make trials incomparable; the trials of `warm_start` were measured by `require`.
        SearchNarrowed: the search is not only wider than before.
    """
    found = spec_differences(old, new)
    if new.finalists is not None and old.finalists is None and old.base.data.confirm_share is None:
        raise RowsSeen(
            f"finalists: the trials of {new.name} were evaluated on all held-out rows, so that none are left on which "
            "the search could be confirmed; begin another sweep (`orchestrate sweep FILE --name OTHER --set "
            "finalists.top=3`), which keeps some from the beginning"
        )
    amendable = [section for section in (*AMENDABLE, "search") if section != "require" or old.warm_start is None]
    fixed = [change for change in found if change.path.split(".")[0] not in amendable and not is_location(change)]
    if fixed:
        raise SpecChanged(new.name, [change.path for change in fixed], [str(change) for change in fixed], AMENDABLE)
    if problems := widening_problems(old, new):
        raise SearchNarrowed(new.name, problems)
    return found


def is_location(change: SettingChange) -> bool:
    """Return whether a file or a folder of `base` or `sft` has only another path."""
    section, _, path = change.path.partition(".")
    return section in ("base", "sft") and is_move(path, change.old, change.new)


def _format_change(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


@dataclass(frozen=True, slots=True)
class Usage:
    """Time used by all drivers and all attempts so far."""

    hours: float
    """Hours of the drivers by the monotonic clock, without pauses of the whole sweep."""
    gpu_hours: float
    """GPUs of each attempt's slot times its hours; without GPUs, slot-hours."""


def budget_exceeded(budget: Budget, usage: Usage) -> str:
    """Return which limit on time is exceeded, as text; "" if none is."""
    if budget.hours is not None and usage.hours >= budget.hours:
        return f"{usage.hours:.3g} of {budget.hours:g} hours spent"
    if budget.gpu_hours is not None and usage.gpu_hours >= budget.gpu_hours:
        return f"{usage.gpu_hours:.3g} of {budget.gpu_hours:g} gpu_hours spent"
    return ""


def target_reached(budget: Budget, objective: Objective, value: float | None) -> bool:
    """Return whether a complete trial with this value of the objective reaches `budget.target`."""
    if budget.target is None or value is None or not math.isfinite(value):
        return False
    return value >= budget.target if objective.direction == "maximize" else value <= budget.target
