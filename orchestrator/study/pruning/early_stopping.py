"""`EarlyStopping`: applies the divergence guard, then the pruner, in the order of the metrics.

`BrokenRequirements` is the part of every pruner that looks at the sweep's requirements.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from operator import attrgetter

from orchestrator.spec.requirements import Requirement, describe_break
from orchestrator.study.pruning.divergence_guard import DivergenceGuard
from orchestrator.study.pruning.pruner import TrialPruner
from trainer.metrics import EVAL_PREFIX
from trainer.results import CONTINUE, StepMetrics, StopDecision

LOSS_METRICS = ("loss", "grad_norm", f"{EVAL_PREFIX}loss")
"""Metrics whose scale depends on the loss settings."""


class BrokenRequirements:
    """Prunes one trial that breaks a requirement and does not come back.

    It does where it breaks the same requirement at `evaluations` measurements in a row, is never nearer to the bound
    than at the one before, and at the last farther from it than at the first. A single bad evaluation is noise, and a
    trial that moves back towards the bound may keep it at its end. The initial model's evaluation never prunes, and a
    trial that reached its end is complete.
    """

    def __init__(self, requirements: Sequence[Requirement], evaluations: int | None, updates: int | None) -> None:
        """`evaluations`: the pruner's `broken_evaluations`; `updates`: of the whole run, None if unknown."""
        self._requirements = requirements if evaluations is not None else ()
        self._evaluations, self._updates = evaluations or 0, updates
        self._initial: Mapping[str, float] = {}
        self._missed: dict[str, list[float]] = {requirement.name: [] for requirement in requirements}

    def start(self, step_metrics: StepMetrics) -> None:
        """Take the initial model's metrics from a trial's or its parent's step 0."""
        if step_metrics.step == 0:
            self._initial = step_metrics.metrics

    def update(self, step_metrics: StepMetrics) -> str:
        """Process the next metrics; return why the trial is pruned, or ""."""
        self.start(step_metrics)
        at_end = self._updates is not None and step_metrics.step >= self._updates
        if step_metrics.step == 0 or at_end:
            return ""
        reasons = [self._reason(requirement, step_metrics) for requirement in self._requirements]
        return next((reason for reason in reasons if reason), "")

    def _reason(self, requirement: Requirement, step_metrics: StepMetrics) -> str:
        if requirement.metric not in step_metrics.metrics:
            return ""
        if requirement.relative_to_initial and requirement.metric not in self._initial:
            return ""  # a clone whose parent's start was not measured
        violation, missed = requirement.violation(step_metrics.metrics, self._initial), self._missed[requirement.name]
        if violation <= 0 or (missed and violation < missed[-1]):
            missed.clear()
        if violation > 0:
            missed.append(violation)
        last = missed[-self._evaluations :]
        if len(last) < self._evaluations or last[-1] <= last[0]:
            return ""
        broken = describe_break(requirement.name, violation, step_metrics.metrics)
        return (
            f"pruned at update {step_metrics.step}: it breaks the requirement {requirement.name} ({broken}), farther "
            f"from it at each of {self._evaluations} evaluations or as far"
        )


class EarlyStopping:
    """Early stopping of one trial by divergence guard and pruner.

    A pure function of the metrics by step: repeated or differently batched metrics give the same decision.
    `make_pruner` returns the pruner with the currently visible trials, which are fixed in a reproducible sweep.
    """

    def __init__(
        self,
        guard: DivergenceGuard,
        make_pruner: Callable[[], TrialPruner],
        metric: str,
        broken: BrokenRequirements | None = None,
        *,
        inherited_until: int = -1,
    ) -> None:
        """Begin with a trial's first metrics.

        Args:
            guard: The divergence guard.
            make_pruner: Returns the pruner.
            metric: The pruner's metric.
            broken: What prunes by requirements; None: nothing does.
            inherited_until: Last update of the checkpoint that a clone continues from.
        """
        self._guard, self._make_pruner, self._metric = guard, make_pruner, metric
        self._broken = broken or BrokenRequirements((), None, None)
        self._inherited_until = inherited_until
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
                if not self.decision.stop and clean and (reason := self._prune_reason(clean[0])):
                    self.decision = StopDecision(stop=True, reason=reason)
        return counted

    def _prune_reason(self, step_metrics: StepMetrics) -> str:
        if self._metric in step_metrics.metrics:
            self._curve[step_metrics.step] = step_metrics.metrics[self._metric]
        if reason := self._broken.update(step_metrics):
            return reason
        if self._metric not in step_metrics.metrics:
            return ""
        return self._make_pruner().prune_reason(self._curve, step_metrics.step, step_metrics.pair_margins)

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
        self._broken.start(step_metrics)
        if self._metric in step_metrics.metrics:
            self._curve[step_metrics.step] = step_metrics.metrics[self._metric]
        return step_metrics
