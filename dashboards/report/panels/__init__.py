"""The report's sections, each a function of an Insight; None where it has nothing to show. To add one: a file, a name.

A panel draws one sweep or several put side by side (dashboards/compare.py): it goes by the frame alone.
"""

from __future__ import annotations

from collections.abc import Callable

from dashboards.diagnosis.diagnose import Insight
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

PANELS: tuple[Callable[[Insight], Panel | None], ...] = (
    winner.answer_panel,
    judgements_panel.panel,
    winner.diagnosis_panel,
    hyperparameters.front_panel,
    heatmaps.panel,
    learning_curves.panel,
    response_quality.collapse_panel,
    hyperparameters.importance_panel,
    hyperparameters.parallel_panel,
    response_quality.samples_panel,
    response_quality.length_panel,
    trials_and_cost.cost_panel,
    trials_and_cost.timeline_panel,
    trials_and_cost.endings_panel,
    winner.setup_panel,
)
