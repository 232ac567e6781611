"""All rules over one sweep.

A sweep's frame with what is concluded from it, computed once for every panel.
"""

from __future__ import annotations

from dataclasses import dataclass

from dashboards.analysis.significance import Certainty, certainty
from dashboards.analysis.sweep_frame import SweepFrame
from dashboards.diagnosis.collapse_rules import (
    answers_lost,
    chosen_falling,
    degenerate_text,
    impossible_logps,
    length_bias,
    margin_below_gamma,
    unlikely_text,
)
from dashboards.diagnosis.findings import Finding, by_weight
from dashboards.diagnosis.search_rules import (
    at_the_edge,
    diverging_region,
    failures,
    not_told_apart,
    too_few_pairs,
    varied_together,
)
from dashboards.diagnosis.training_rules import (
    coin_toss,
    gain_not_clear,
    loss_plateau,
    overfitting,
    ties,
    worse_than_start,
)
from orchestrator.study.importance import importance


def diagnose(frame: SweepFrame, sure: Certainty | None = None) -> list[Finding]:
    """What there is to say about this sweep, the weightiest first. `sure`: its certainty, where known already."""
    sure = sure or certainty(frame)
    found = [*failures(frame), *diverging_region(frame), *impossible_logps(frame)]
    if sure is not None:
        winner = sure.winner
        found += [
            *worse_than_start(frame, sure),
            *gain_not_clear(frame, sure),
            *chosen_falling(frame, winner),
            *answers_lost(frame, winner),
            *unlikely_text(frame, winner),
            *degenerate_text(winner),
            *margin_below_gamma(winner),
            *coin_toss(frame, winner),
            *ties(winner),
            *loss_plateau(winner),
            *overfitting(frame, winner),
            *at_the_edge(frame),
            *not_told_apart(frame),
            *varied_together(frame),
            *too_few_pairs(sure),
            *length_bias(winner),
        ]
    return by_weight(found)


@dataclass(frozen=True, slots=True, eq=False)
class Insight:
    """What panels draw from. `importances`: searched leaf -> share of the goal's variance, biggest first."""

    frame: SweepFrame
    sure: Certainty | None
    findings: tuple[Finding, ...]
    importances: dict[str, float]


def insight(frame: SweepFrame) -> Insight:
    """Everything that is concluded from one sweep."""
    sure = certainty(frame)
    found = importance(frame.space, [case.record for case in frame.trials], frame.goal)
    return Insight(frame, sure, tuple(diagnose(frame, sure)), found)
