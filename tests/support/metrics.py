"""Metrics that tests report, how their trials end, and what is left of them without the clock."""

from collections.abc import Sequence

from orchestrator.study.trial_records import FailureKind, Outcome, TrialState
from tests.support.specs import METRIC
from trainer.results import StepMetrics

SPEED = ("tokens_per_second", "pairs_per_second")
COMPLETE = Outcome(TrialState.COMPLETE)
DIVERGED = Outcome(TrialState.PRUNED, "diverged: loss is nan at step 3", diverged=True)


def bug(text: str) -> Outcome:
    return Outcome(TrialState.FAILED, text, FailureKind.BUG)


def evaluated(step: int, value: float, **more: float) -> StepMetrics:
    return StepMetrics(step, {METRIC: value, **more})


def without_speed(metrics: Sequence[StepMetrics]) -> list[tuple[int, dict[str, float]]]:
    """Points without what the clock says."""
    return [(p.step, {k: v for k, v in p.metrics.items() if k not in SPEED}) for p in metrics]
