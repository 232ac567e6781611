"""The report's panels in order. Each is a function of a SweepAnalysis that returns None without content.

To add a panel, write such a function and list it in `PANELS`. A panel must work for one sweep and for several merged
ones (dashboards/analysis/comparison.py).
"""

from __future__ import annotations

from collections.abc import Callable

from dashboards.diagnosis.diagnose import SweepAnalysis
from dashboards.report.blocks import Panel
from dashboards.report.panels import (
    distance_panel,
    finalists_panel,
    heatmaps,
    hyperparameters,
    judgements_panel,
    learning_curves,
    response_quality,
    result_panels,
    trials_and_cost,
)

PANELS: tuple[Callable[[SweepAnalysis], Panel | None], ...] = (
    result_panels.winner_panel,
    finalists_panel.finalists_panel,
    judgements_panel.judgements_panel,
    result_panels.diagnosis_panel,
    distance_panel.distance_panel,
    hyperparameters.pareto_front_panel,
    heatmaps.heatmap_panel,
    heatmaps.interactions_panel,
    learning_curves.learning_curves_panel,
    response_quality.collapse_panel,
    hyperparameters.importance_panel,
    hyperparameters.parallel_panel,
    response_quality.samples_panel,
    response_quality.length_panel,
    trials_and_cost.cost_panel,
    trials_and_cost.timeline_panel,
    trials_and_cost.trials_panel,
    result_panels.setup_panel,
)
