"""All rules over one sweep."""

from __future__ import annotations

from dashboards.certainty import Certainty, certainty
from dashboards.diagnosis.answers import answers_lost, degenerate_text, length_bias
from dashboards.diagnosis.broken import diverging_region, failures
from dashboards.diagnosis.finding import Finding, by_weight
from dashboards.diagnosis.health import chosen_falling, impossible_logps, margin_below_gamma, unlikely_text
from dashboards.diagnosis.learning import coin_toss, gain_not_clear, ties, worse_than_start
from dashboards.diagnosis.loss import loss_plateau, overfitting
from dashboards.diagnosis.search import at_the_edge, not_told_apart, too_few_pairs
from dashboards.diagnosis.together import varied_together
from dashboards.sweep_frame import SweepFrame


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
