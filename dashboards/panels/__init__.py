"""The report's sections, each a function of an Insight; None where it has nothing to show. To add one: a file, a name.

A panel draws one sweep or several put side by side (dashboards/compare.py): it goes by the frame alone.
"""

from __future__ import annotations

from collections.abc import Callable

from dashboards.blocks import Panel
from dashboards.insight import Insight
from dashboards.panels import (
    answer,
    collapse,
    cost,
    curves,
    diagnosis,
    endings,
    front,
    heatmap,
    importance,
    judge,
    length,
    parallel,
    samples,
    setup,
    timeline,
)

PANELS: tuple[Callable[[Insight], Panel | None], ...] = (
    answer.panel,
    judge.panel,
    diagnosis.panel,
    front.panel,
    heatmap.panel,
    curves.panel,
    collapse.panel,
    importance.panel,
    parallel.panel,
    samples.panel,
    length.panel,
    cost.panel,
    timeline.panel,
    endings.panel,
    setup.panel,
)
