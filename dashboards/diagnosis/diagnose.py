"""`diagnose` applies all rules to one sweep; `SweepAnalysis` is the frame with everything computed from it."""

from __future__ import annotations

from dataclasses import dataclass

from dashboards.analysis.significance import Significance, analyze_significance
from dashboards.analysis.sweep_frame import SweepFrame
from dashboards.diagnosis.collapse_rules import (
    chosen_logps_falling,
    degenerate_text,
    exact_answers_lost,
    impossible_logps,
    length_bias,
    margin_below_gamma,
    requirements_broken,
    unlikely_text,
)
from dashboards.diagnosis.conflicts import resolve_conflicts
from dashboards.diagnosis.distance_rules import answers_fall_with_distance
from dashboards.diagnosis.findings import DiagnosisFinding, by_level
from dashboards.diagnosis.search_rules import (
    confounded,
    diverging_region,
    failures,
    no_clear_effect,
    optimum_at_boundary,
    too_few_pairs,
)
from dashboards.diagnosis.training_rules import (
    accuracy_at_chance,
    confirmed_without_gain,
    gain_not_clear,
    loss_plateau,
    objective_lost,
    overfitting,
    ties,
    worse_than_initial,
)
from orchestrator.commands.rehearsal import is_rehearsal
from orchestrator.study.importance import PedAnova, importance, ped_anova


def diagnose(frame: SweepFrame, significance: Significance | None = None) -> list[DiagnosisFinding]:
    """Return the findings about a sweep, the most serious first; none about a rehearsal, whose figures mean nothing.

    `significance`: the sweep's significance analysis; computed here where None.
    """
    if is_rehearsal(frame.spec):
        return []
    significance = significance or analyze_significance(frame)
    found = [*requirements_broken(frame), *failures(frame), *diverging_region(frame), *impossible_logps(frame)]
    if significance is not None:
        winner = significance.winner
        found += [
            *worse_than_initial(frame, significance),
            *objective_lost(frame, winner),
            *gain_not_clear(frame, significance),
            *confirmed_without_gain(frame, winner),
            *chosen_logps_falling(frame, winner),
            *exact_answers_lost(frame, winner),
            *answers_fall_with_distance(frame),
            *unlikely_text(frame, winner),
            *degenerate_text(frame, winner),
            *margin_below_gamma(frame, winner),
            *accuracy_at_chance(frame, winner),
            *ties(winner),
            *loss_plateau(frame, significance),
            *overfitting(frame, winner),
            *optimum_at_boundary(frame),
            *no_clear_effect(frame),
            *confounded(frame),
            *length_bias(winner),
        ]
        found += too_few_pairs(frame, significance, found)
    return by_level(resolve_conflicts(found))


@dataclass(frozen=True, slots=True, eq=False)
class SweepAnalysis:
    """Input of all report panels. `importances`: fANOVA's, setting -> share of the objective's variance, sorted."""

    frame: SweepFrame
    significance: Significance | None
    findings: tuple[DiagnosisFinding, ...]
    importances: dict[str, float]
    ped_anova: PedAnova

    @property
    def is_rehearsal(self) -> bool:
        """Whether this one sweep is a rehearsal, of which nothing is concluded."""
        return not self.frame.sweeps and is_rehearsal(self.frame.spec)


def analyze(frame: SweepFrame) -> SweepAnalysis:
    """Return the sweep's significance, findings and importances."""
    significance = analyze_significance(frame)
    found = tuple(diagnose(frame, significance))
    records = [trial.record for trial in frame.trials]
    return SweepAnalysis(
        frame,
        significance,
        found,
        importance(frame.space, records, frame.objective),
        ped_anova(frame.space, records, frame.objective),
    )
