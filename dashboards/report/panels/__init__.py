"""The report's panels in order, each a function of a SweepAnalysis; None without anything to show.

To add one: write a function and name it in `PANELS`. A panel draws one sweep or several side by side
(dashboards/analysis/comparison.py), from the frame alone.
"""

from __future__ import annotations

from collections.abc import Callable

from dashboards.diagnosis.diagnose import SweepAnalysis
from dashboards.report.blocks import Panel
from dashboards.report.panels import (
    heatmaps,
    hyperparameters,
    judgements_panel,
    learning_curves,
    response_quality,
    trials_and_cost,
    winner,
)

PANELS: tuple[Callable[[SweepAnalysis], Panel | None], ...] = (
    winner.winner_panel,
    judgements_panel.judgements_panel,
    winner.diagnosis_panel,
    hyperparameters.front_panel,
    heatmaps.heatmap_panel,
    learning_curves.learning_curves_panel,
    response_quality.collapse_panel,
    hyperparameters.importance_panel,
    hyperparameters.parallel_panel,
    response_quality.samples_panel,
    response_quality.length_panel,
    trials_and_cost.cost_panel,
    trials_and_cost.timeline_panel,
    trials_and_cost.trials_panel,
    winner.setup_panel,
)
