"""Settings of pruners. A pruner compares trials at their evaluations by one held-out metric."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from orchestrator.spec.objectives import Objective
from trainer.config.base import Fraction, FrozenModel, NonEmptyStr, NonNegativeFloat, PositiveInt
from trainer.metrics import MARGIN, lookup

PAIRED_METRIC = MARGIN
"""Metric of the paired test: the margin of length-normalized log-probs of each pair, which no setting scales."""


def _amount(value: float) -> float:
    if value < 1 or float(value).is_integer():
        return int(value) if value >= 1 else value
    raise ValueError(f"{value:g} is neither a number of updates (1, 2, ...) nor a share of the training (below 1)")


Amount = Annotated[
    int | float,
    Field(gt=0, description="Updates, as a whole number, or a share of the training below 1."),
    AfterValidator(_amount),
]
Warmup = Annotated[
    int | float,
    Field(ge=0, description="No trial is pruned before: updates, or a share of the training below 1."),
    AfterValidator(_amount),
]
PruningMetric = Annotated[
    NonEmptyStr | None, Field(description="Metric that trials are compared by; by default the objective.")
]


BROKEN_EVALUATIONS = 3
"""Default of `broken_evaluations`."""


class NoPruner(FrozenModel):
    """Every trial runs to its end."""

    kind: Literal["none"] = "none"


class _StopsBrokenTrials(FrozenModel):
    broken_evaluations: Annotated[int, Field(ge=2)] | None = Field(
        default=BROKEN_EVALUATIONS,
        description="Evaluations in a row at which a trial breaks the same requirement (`require`), never nearer to it "
        "than at the one before and at the last farther than at the first, after which it is pruned; null: never.",
    )


class _RungSettings(_StopsBrokenTrials):
    metric: PruningMetric = None
    min_resource: Amount = 0.1
    reduction_factor: Annotated[int, Field(ge=2, description="One of this many trials continues at each rung.")] = 3


class SuccessiveHalvingPruner(_RungSettings):
    """At each rung the best 1 / reduction_factor of the trials continues (ASHA, Li et al. 2020)."""

    kind: Literal["successive_halving"] = "successive_halving"
    rungs: Annotated[tuple[Amount, ...], Field(min_length=1)] | None = Field(
        default=None, description="Where trials are compared; by default min_resource times powers of reduction_factor."
    )

    @model_validator(mode="after")
    def _check_ascending(self) -> Self:
        _check_rungs(self.rungs)
        return self


class HyperbandPruner(_RungSettings):
    """Successive halving in brackets with different first rungs, so that slow starters survive (Li et al. 2018)."""

    kind: Literal["hyperband"] = "hyperband"


class PercentilePruner(_StopsBrokenTrials):
    """Stops a trial whose best value so far is outside the best `percentile` of the other trials at the same update."""

    kind: Literal["percentile"] = "percentile"
    metric: PruningMetric = None
    percentile: Annotated[float, Field(gt=0, lt=100)] = Field(
        default=25.0, description="Trials within this best share continue."
    )
    n_startup_trials: PositiveInt = Field(
        default=5, description="Trials that must have completed before any is stopped."
    )
    n_warmup_steps: Warmup = 0
    n_min_trials: PositiveInt = Field(
        default=1, description="Trials with a value at that update that a comparison needs."
    )


class MedianPruner(_StopsBrokenTrials):
    """Stops a trial whose best value so far is worse than the median of the other trials at the same update."""

    kind: Literal["median"] = "median"
    metric: PruningMetric = None
    n_startup_trials: PositiveInt = Field(
        default=5, description="Trials that must have completed before any is stopped."
    )
    n_warmup_steps: Warmup = 0
    n_min_trials: PositiveInt = Field(
        default=1, description="Trials with a value at that update that a comparison needs."
    )


class ThresholdPruner(_StopsBrokenTrials):
    """Stops a trial whose metric leaves fixed bounds, or is NaN."""

    kind: Literal["threshold"] = "threshold"
    metric: PruningMetric = None
    lower: float | None = Field(default=None, description="Stop below this value.")
    upper: float | None = Field(default=None, description="Stop above this value.")
    n_warmup_steps: Warmup = 0

    @model_validator(mode="after")
    def _check_bounds(self) -> Self:
        if self.lower is None and self.upper is None:
            raise ValueError("needs lower, upper or both")
        if self.lower is not None and self.upper is not None and self.lower >= self.upper:
            raise ValueError(f"lower {self.lower:g} is not below upper {self.upper:g}")
        return self


class WilcoxonPruner(_StopsBrokenTrials):
    """Stops a trial that is worse than the best one by a Wilcoxon signed-rank test over the held-out pairs."""

    kind: Literal["wilcoxon"] = "wilcoxon"
    p_threshold: Fraction = Field(default=0.1, description="Stop where the test's p-value is below this.")
    n_warmup_steps: Warmup = Field(
        default=0.5,
        description="No trial is pruned before: updates, or a share of the training below 1. Early differences show "
        "the learning rate rather than the final result.",
    )


RankingPruner = (
    HyperbandPruner | SuccessiveHalvingPruner | MedianPruner | PercentilePruner | ThresholdPruner | WilcoxonPruner
)


class PatientPruner(_StopsBrokenTrials):
    """Stops a trial whose best value of the last patience + 1 evaluations is worse than its best before.

    With `wrapped`, only if that pruner agrees.
    """

    kind: Literal["patient"] = "patient"
    metric: PruningMetric = None
    patience: PositiveInt = Field(
        default=3, description="The last patience + 1 evaluations are compared with those before."
    )
    min_delta: NonNegativeFloat = Field(default=0.0, description="By how much their best may be worse.")
    wrapped: Annotated[RankingPruner, Field(discriminator="kind")] | None = Field(
        default=None, description="Another pruner that has to agree."
    )


Pruner = Annotated[NoPruner | RankingPruner | PatientPruner, Field(discriminator="kind")]

PRUNED_FROM = 20
"""Trials of the smallest sweep that has a pruner by default."""


def pruning_metric(pruner: Pruner, objectives: tuple[Objective, ...]) -> Objective | None:
    """Return metric and direction that the pruner compares by; None if its metric has no better direction."""
    if isinstance(pruner, WilcoxonPruner):
        return Objective(metric=PAIRED_METRIC, direction="maximize")
    metric = None if isinstance(pruner, NoPruner) else pruner.metric
    if metric is None:
        return objectives[0]
    same = next((objective for objective in objectives if objective.metric == metric), None)
    known = lookup(metric)
    if same is not None or known is None:
        return same or Objective(metric=metric, direction="maximize")
    match known.better:
        case "maximize" | "minimize":
            return Objective(metric=metric, direction=known.better)
        case _:
            return None


def broken_evaluations(pruner: Pruner) -> int | None:
    """Return the pruner's `broken_evaluations`; None if it never stops a trial for a requirement."""
    return None if isinstance(pruner, NoPruner) else pruner.broken_evaluations


def depends_on_other_trials(pruner: Pruner) -> bool:
    """Return whether a pruning decision depends on other trials."""
    match pruner:
        case NoPruner() | ThresholdPruner():
            return False
        case PatientPruner(wrapped=wrapped):
            return wrapped is not None and depends_on_other_trials(wrapped)
        case _:
            return True


def _check_rungs(rungs: tuple[float, ...] | None) -> None:
    for low, high in zip(rungs or (), (rungs or ())[1:], strict=False):
        if isinstance(low, int) != isinstance(high, int):
            raise ValueError("rungs are all updates or all shares of the training")
        if low >= high:
            raise ValueError(f"rungs must increase: {high:g} comes after {low:g}")
