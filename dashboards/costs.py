"""What trials cost, and what stopping them early saved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dashboards.sweep_frame import TrialCase
from orchestrator.study.state import TrialState


@dataclass(frozen=True, slots=True)
class Costs:
    """Sums over trials. `tokens` is None where some trial logged none."""

    trials: int
    seconds: float
    """In workers' hands, all attempts."""
    updates: int
    pairs: int
    tokens: float | None
    saved_updates: int
    saved_seconds: float
    """What the pruned trials had left to do, at each one's own pace."""


def costs(cases: Sequence[TrialCase]) -> Costs:
    """The cost of these trials together."""
    saved_updates, saved_seconds = 0, 0.0
    for case in cases:
        if case.record.state is TrialState.PRUNED and case.steps is not None and case.view.step > 0:
            left = max(0, case.steps - case.view.step)
            saved_updates += left
            saved_seconds += case.record.seconds * left / case.view.step
    counted = [case.tokens for case in cases if case.view.step > 0]
    tokens = [count for count in counted if count is not None]
    return Costs(
        trials=len(cases),
        seconds=sum(case.record.seconds for case in cases),
        updates=sum(case.view.step for case in cases),
        pairs=sum(case.view.step * case.config.training.pairs_per_update for case in cases),
        tokens=sum(tokens) if tokens and len(tokens) == len(counted) else None,
        saved_updates=saved_updates,
        saved_seconds=saved_seconds,
    )
