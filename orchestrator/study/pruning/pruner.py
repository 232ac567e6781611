"""`TrialPruner`: the configured rule applied to one trial at one evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import assert_never

from orchestrator.spec.objectives import Objective
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
    pruning_metric,
)
from orchestrator.spec.sweep_spec import SweepSpec
from orchestrator.study.pruning.pruning_rules import (
    LearningCurve,
    best_complete_trial,
    hyperband_reason,
    patient_reason,
    percentile_reason,
    successive_halving_reason,
    threshold_reason,
    wilcoxon_reason,
)
from orchestrator.study.sampling.random_samplers import sampler_seed
from orchestrator.study.trial_snapshots import TrialSnapshot
from trainer.results import unpack_floats

PairMarginsOf = Callable[[int], Mapping[int, str]]


def pruning_objective(spec: SweepSpec) -> Objective:
    """Return metric and direction that the sweep's pruner compares by."""
    objective = pruning_metric(spec.pruner, spec.objectives)
    assert objective is not None  # the loader refuses a metric without a direction
    return objective


@dataclass(frozen=True, slots=True)
class TrialPruner:
    """The pruner of one trial with the trials visible to it. A decision depends on its fields and arguments only."""

    pruner: Pruner
    objective: Objective
    seed: int
    number: int
    updates: int | None
    snapshots: Sequence[TrialSnapshot]
    best_other: tuple[int, Mapping[int, str]] | None = None
    """For the paired test: the best visible trial, and its packed pair margins by update."""

    @classmethod
    def create(
        cls,
        spec: SweepSpec,
        number: int,
        updates: int | None,
        snapshots: Sequence[TrialSnapshot],
        pair_margins_of: PairMarginsOf = lambda _: {},
    ) -> TrialPruner:
        """Return the pruner of trial `number`; `pair_margins_of`: another trial's packed pair margins by update."""
        best_other = (
            best_complete_trial(snapshots, spec.first_objective) if isinstance(spec.pruner, WilcoxonPruner) else None
        )
        against = None if best_other is None else (best_other.number, pair_margins_of(best_other.number))
        return cls(
            spec.pruner, pruning_objective(spec), sampler_seed(spec.sampler), number, updates, snapshots, against
        )

    def prune_reason(self, curve: Mapping[int, float], step: int, pair_margins: str = "") -> str:
        """Return why the trial is pruned at this evaluation, by its metric per update (`curve`); "" to continue.

        The initial model's evaluation never prunes, and a trial that reached its end is complete.
        """
        values = {at: value for at, value in curve.items() if 0 < at <= step}
        if step not in values or (self.updates is not None and step >= self.updates):
            return ""
        return self._prune_reason(
            self.pruner, LearningCurve(self.number, values, self.objective, self.updates), pair_margins
        )

    def _prune_reason(self, pruner: Pruner, own: LearningCurve, pair_margins: str) -> str:
        match pruner:
            case NoPruner():
                return ""
            case MedianPruner() | PercentilePruner():
                return percentile_reason(pruner, own, self.snapshots)
            case SuccessiveHalvingPruner():
                return successive_halving_reason(pruner, own, self.snapshots)
            case HyperbandPruner():
                return hyperband_reason(pruner, own, self.snapshots, self.seed)
            case ThresholdPruner():
                return threshold_reason(pruner, own)
            case PatientPruner(wrapped=wrapped):
                reason = patient_reason(pruner, own)
                if not reason or wrapped is None:
                    return reason
                return self._prune_reason(wrapped, own, pair_margins)
            case WilcoxonPruner():
                if self.best_other is None or own.step not in self.best_other[1]:
                    return ""
                number, theirs = self.best_other
                return wilcoxon_reason(
                    pruner, own, unpack_floats(pair_margins), number, unpack_floats(theirs[own.step])
                )
            case _:
                assert_never(pruner)
