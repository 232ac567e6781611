"""The pruner's verdict on one trial at one evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import assert_never

from orchestrator.spec.objectives import Goal
from orchestrator.spec.pruners import (
    HyperbandPruner,
    MedianPruner,
    NoPruner,
    PatientPruner,
    PercentilePruner,
    Pruner,
    SuccessiveHalvingPruner,
    ThresholdPruner,
    WilcoxonPruner,
    judged_by,
)
from orchestrator.spec.sweep_spec import SweepSpec
from orchestrator.study.pruning.pruning_rules import (
    Course,
    best_known,
    hyperband,
    out_of_patience,
    percentile,
    successive_halving,
    threshold,
    wilcoxon,
)
from orchestrator.study.sampling.random_samplers import seed_of
from orchestrator.study.trial_snapshots import Known
from trainer.results import unpack

PairsOf = Callable[[int], Mapping[int, str]]


def judged(spec: SweepSpec) -> Goal:
    """The metric that this sweep's pruner looks at."""
    goal = judged_by(spec.pruner, spec.goals)
    assert goal is not None  # the file's door refuses others
    return goal


@dataclass(frozen=True, slots=True)
class Judge:
    """The pruner of one trial, with what that trial may know. Asked twice, it says the same twice."""

    pruner: Pruner
    goal: Goal
    seed: int
    number: int
    updates: int | None
    known: Sequence[Known]
    rival: tuple[int, Mapping[int, str]] | None = None
    """For the paired test: the best trial known, and its `Point.pairs` by update."""

    @classmethod
    def of(
        cls, spec: SweepSpec, number: int, updates: int | None, known: Sequence[Known], pairs: PairsOf = lambda _: {}
    ) -> Judge:
        """The judge of trial `number`; `pairs` gives another trial's `Point.pairs` by update."""
        rival = best_known(known, spec.goal) if isinstance(spec.pruner, WilcoxonPruner) else None
        against = None if rival is None else (rival.number, pairs(rival.number))
        return cls(spec.pruner, judged(spec), seed_of(spec.sampler), number, updates, known, against)

    def reason(self, course: Mapping[int, float], step: int, pairs: str = "") -> str:
        """Why the trial stops at this evaluation, given its metric by update; empty: it goes on.

        The start model's evaluation is judged by nobody, and a trial that reached its end is complete.
        """
        values = {at: value for at, value in course.items() if 0 < at <= step}
        if step not in values or (self.updates is not None and step >= self.updates):
            return ""
        return self._reason(self.pruner, Course(self.number, values, self.goal, self.updates), pairs)

    def _reason(self, pruner: Pruner, own: Course, pairs: str) -> str:
        match pruner:
            case NoPruner():
                return ""
            case MedianPruner() | PercentilePruner():
                return percentile(pruner, own, self.known)
            case SuccessiveHalvingPruner():
                return successive_halving(pruner, own, self.known)
            case HyperbandPruner():
                return hyperband(pruner, own, self.known, self.seed)
            case ThresholdPruner():
                return threshold(pruner, own)
            case PatientPruner(wrapped=wrapped):
                reason = out_of_patience(pruner, own)
                if not reason or wrapped is None:
                    return reason
                return self._reason(wrapped, own, pairs)
            case WilcoxonPruner():
                if self.rival is None or own.step not in self.rival[1]:
                    return ""
                number, theirs = self.rival
                return wilcoxon(pruner, own, unpack(pairs), number, unpack(theirs[own.step]))
            case _:
                assert_never(pruner)
