"""`EarlyStopping`: applies the divergence guard, then the pruner, in the order of the metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from operator import attrgetter

from orchestrator.study.pruning.divergence_guard import DivergenceGuard
from orchestrator.study.pruning.pruner import TrialPruner
from trainer.metrics import EVAL_PREFIX
from trainer.results import CONTINUE, StepMetrics, StopDecision

LOSS_METRICS = ("loss", "grad_norm", f"{EVAL_PREFIX}loss")
"""Metrics whose scale depends on the loss settings."""


class EarlyStopping:
    """Early stopping of one trial by divergence guard and pruner.

    A pure function of the metrics by step: repeated or differently batched metrics give the same decision.
    `make_pruner` returns the pruner with the currently visible trials, which are fixed in a reproducible sweep.
    """

    def __init__(
        self, guard: DivergenceGuard, make_pruner: Callable[[], TrialPruner], metric: str, *, inherited_until: int = -1
    ) -> None:
        """`metric`: the pruner's; `inherited_until`: last update of the checkpoint that a clone continues from."""
        self._guard, self._make_pruner, self._metric, self._inherited_until = (
            guard,
            make_pruner,
            metric,
            inherited_until,
        )
        self._curve: dict[int, float] = {}
        self._seen = -1
        self.decision = CONTINUE

    def update(self, metrics: Iterable[StepMetrics]) -> list[StepMetrics]:
        """Process new metrics, in any order within the call; return those up to the step at which the trial stops."""
        counted: list[StepMetrics] = []
        for step_metrics in sorted(metrics, key=attrgetter("step")):
            fresh = step_metrics.step > self._seen
            if fresh and self.decision.stop:
                break
            if step_metrics.step <= self._inherited_until:
                counted.append(self._inherit(step_metrics))
                continue
            clean = self._guard.update([step_metrics])
            counted += clean
            if fresh:
                self._seen = step_metrics.step
                self.decision = self._guard.decision
                if not self.decision.stop and clean and self._metric in clean[0].metrics:
                    self._curve[step_metrics.step] = clean[0].metrics[self._metric]
                    if reason := self._make_pruner().prune_reason(
                        self._curve, step_metrics.step, step_metrics.pair_margins
                    ):
                        self.decision = StopDecision(stop=True, reason=reason)
        return counted

    def _inherit(self, step_metrics: StepMetrics) -> StepMetrics:
        """Pass on metrics inherited from the parent's checkpoint: they are not judged here.

        Loss-scaled ones are hidden from the guard; if it stops on the others, the trial ends at its own first metrics.
        """
        self._guard.update(
            [
                replace(
                    step_metrics,
                    metrics={name: value for name, value in step_metrics.metrics.items() if name not in LOSS_METRICS},
                )
            ]
        )
        self._seen = max(self._seen, step_metrics.step)
        if self._metric in step_metrics.metrics:
            self._curve[step_metrics.step] = step_metrics.metrics[self._metric]
        return step_metrics
