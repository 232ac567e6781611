"""All rules over one sweep."""

from __future__ import annotations

from dashboards.certainty import Certainty, certainty
from dashboards.diagnosis.finding import Finding, by_weight
from dashboards.diagnosis.health import (
    answers_lost,
    chosen_falling,
    degenerate_text,
    length_bias,
    margin_below_gamma,
    unlikely_text,
)
from dashboards.diagnosis.learning import coin_toss, loss_plateau, ties, worse_than_start
from dashboards.diagnosis.search import at_the_edge, diverging_region, failures, not_told_apart, too_few_pairs
from dashboards.sweep_frame import SweepFrame


def diagnose(frame: SweepFrame, sure: Certainty | None = None) -> list[Finding]:
    """What there is to say about this sweep, the weightiest first. `sure`: its certainty, where known already."""
    sure = sure or certainty(frame)
    found = [*failures(frame), *diverging_region(frame)]
    if sure is not None:
        winner = sure.winner
        found += [
            *worse_than_start(frame, sure),
            *chosen_falling(frame, winner),
            *answers_lost(frame, winner),
            *unlikely_text(frame, winner),
            *degenerate_text(winner),
            *margin_below_gamma(winner),
            *coin_toss(frame, winner),
            *ties(winner),
            *loss_plateau(winner),
            *at_the_edge(frame),
            *not_told_apart(frame),
            *too_few_pairs(sure),
            *length_bias(winner),
        ]
    return by_weight(found)
