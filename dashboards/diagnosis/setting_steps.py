"""Steps that move a setting to values that the sweep's own trials have neither tried nor ruled out."""

from __future__ import annotations

import math
from enum import StrEnum
from typing import Any

from dashboards.analysis.param_effects import (
    ParamLevel,
    difference_to_winner,
    diverged_from,
    is_number,
    levels,
    mostly_diverged_from,
    round_value,
)
from dashboards.analysis.small_samples import ROUNDING_TOLERANCE
from dashboards.analysis.sweep_frame import SweepFrame, TrialFrame
from dashboards.diagnosis.findings import LEARNING_RATE, Advice, Direction
from dashboards.formatting import format_value
from trainer.config.loss_config import CpoLoss, DpoLoss, KtoLoss, SftLoss, SimpoLoss
from trainer.metrics import EVAL_PREFIX

LOWER_SHARES = (0.25, 0.5)
"""Shares of the winner's learning rate to try where it harms the model."""
DIVERGED_SHARES = (0.03, 0.1, 0.3)
"""Shares of the lowest diverged learning rate to try where no trial completed."""
FIRST_SFT_WEIGHT = 0.1
"""Weight of the cross-entropy to try first, the SimPO authors' value."""
_BETTER_BETA = 10.0
"""SimPO's beta that its authors often found better than their first ones."""


def lower_rate(at: float, *shares: float) -> Advice:
    """Return the step to learning rates that are these shares of `at`."""
    values = tuple(round_value(at * share) for share in shares)
    return Advice(f"lower the learning rate (try {_listed(values)})", LEARNING_RATE, Direction.LOWER, values)


def higher_rate(frame: SweepFrame, winner: TrialFrame) -> Advice | None:
    """Return the step to learning rates above all tried ones; None where tried ones show that it will not help.

    They show it where a higher rate than the winner's is clearly worse, or where 3 times the highest diverged.
    """
    at = winner.config.training.learning_rate
    if is_ruled_out(frame, LEARNING_RATE, Direction.RAISE):
        return None
    tried = [trial.config.training.learning_rate for trial in frame.comparable_trials]
    highest = max([at, *tried])
    limits = [
        limit for limit in (diverged_from(frame, LEARNING_RATE), mostly_diverged_from(frame, LEARNING_RATE)) if limit
    ]
    values = tuple(v for v in (round_value(highest * 3), round_value(highest * 10)) if all(v < x for x in limits))
    if not values:
        return None
    return Advice(f"raise the learning rate (try {_listed(values)})", LEARNING_RATE, Direction.RAISE, values)


def lowest_rate(frame: SweepFrame) -> float:
    """Return the lowest learning rate of the complete trials, of diverged ones where none completed."""
    trials = frame.ranked or [trial for trial in frame.trials if trial.record.diverged]
    return min(trial.config.training.learning_rate for trial in trials)


def raise_beta(frame: SweepFrame, winner: TrialFrame) -> Advice | None:
    """Return the step to a higher beta; None for losses in which beta weighs something else."""
    loss = winner.config.loss
    if not isinstance(loss, (SimpoLoss, DpoLoss, CpoLoss, KtoLoss)):
        return None
    limit = diverged_from(frame, "loss.beta")
    cited = isinstance(loss, SimpoLoss) and loss.beta < _BETTER_BETA and (limit is None or limit > _BETTER_BETA)
    better = "; the SimPO authors often found 10 better" if cited else ""
    below = "" if limit is None else f", below {format_value(limit)}"
    return Advice(f"raise beta (now {format_value(loss.beta)}{below}{better})", "loss.beta", Direction.RAISE)


def lower_gamma(frame: SweepFrame) -> Advice | None:
    """Return the step to a smaller gamma; None where smaller ones are clearly worse."""
    path = next((p for p in ("loss.gamma_beta_ratio", "loss.gamma") if p in frame.paths), "loss.gamma")
    if is_ruled_out(frame, path, Direction.LOWER):
        return None
    return Advice("try a smaller gamma", path, Direction.LOWER)


def train_longer(frame: SweepFrame, text: str = "train longer") -> Advice | None:
    """Return the step to more updates; None where trials with more updates are clearly worse."""
    path = length_path(frame)
    return None if is_ruled_out(frame, path, Direction.RAISE) else Advice(text, path, Direction.RAISE)


def fewer_updates(frame: SweepFrame, text: str) -> Advice:
    """Return the step to fewer updates."""
    return Advice(text, length_path(frame), Direction.LOWER)


def length_path(frame: SweepFrame) -> str:
    """Return the setting of the number of updates: the searched one, else `training.max_steps`."""
    return next((path for path in ("training.num_train_epochs",) if path in frame.paths), "training.max_steps")


def raise_sft_weight(winner: TrialFrame) -> Advice | None:
    """Return the step to a higher weight of the cross-entropy on the chosen responses; None for SFT itself."""
    loss = winner.config.loss
    if isinstance(loss, SftLoss):
        return None
    simpo = isinstance(loss, SimpoLoss)
    weight = loss.cross_entropy_weight if simpo else loss.nll_scale
    path = "loss.sft_weight" if simpo and loss.nll_scale == 0 else "loss.nll_scale"
    if weight == 0:
        return Advice(f"add {path}: {FIRST_SFT_WEIGHT}", path, Direction.RAISE, (FIRST_SFT_WEIGHT,))
    return Advice(f"raise {path} (now {format_value(weight)})", path, Direction.RAISE)


def is_ruled_out(frame: SweepFrame, path: str, direction: Direction) -> bool:
    """Return whether a value tried on this side of the winner's speaks against going there.

    It does where its best trial is clearly worse than the winner, and where it is worse at all, which is weak evidence
    but the only one, unless none of its trials has changed its held-out loss: these have shown nothing yet.
    """
    ranked = frame.comparable_trials
    at: Any = ranked[0].record.params.get(path) if ranked else None
    if path not in frame.paths or not is_number(at):
        return False
    return any(
        _speaks_against(frame, path, level)
        for level in levels(frame, path)
        if is_number(level.value) and level.value != at and (level.value > at) == (direction is Direction.RAISE)
    )


def _speaks_against(frame: SweepFrame, path: str, level: ParamLevel) -> bool:
    value = frame.comparable_trials[0].record.value
    if value is None or math.isclose(value, level.best, rel_tol=1e-9, abs_tol=ROUNDING_TOLERANCE):
        return False
    difference = difference_to_winner(frame, path, level)
    if difference is None or difference.is_clear:
        return True
    return any(loss_trend(trial) is not LossTrend.FLAT for trial in level.trials)


def present(*steps: Advice | None) -> tuple[Advice, ...]:
    """Return the steps that are not None."""
    return tuple(step for step in steps if step is not None)


def _listed(values: tuple[float, ...]) -> str:
    return " and ".join(format_value(value) for value in values)


# --- how the held-out loss moved -------------------------------------------------------------------------------------

LOSS = f"{EVAL_PREFIX}loss"
MIN_LOSS_DROP = 0.02
"""Share of the initial held-out loss. A smaller drop counts as no drop."""
MIN_LOSS_RISE = 0.005
"""Share of the initial held-out loss. A loss that did not drop and ends higher by more than this counts as risen: the
pairs are the same at every step, so that a small rise is no noise."""


class LossTrend(StrEnum):
    """How the held-out loss moved over a trial."""

    FELL = "fell"
    FLAT = "flat"
    ROSE = "rose"


def loss_trend(trial: TrialFrame) -> LossTrend | None:
    """Return how the held-out loss moved; None with fewer than three evaluations."""
    curve = finite_curve(trial, LOSS)
    if len(curve) < 3 or curve[-1][0] == 0:
        return None
    start, end, lowest = curve[0][1], curve[-1][1], min(value for _, value in curve)
    if start - lowest >= MIN_LOSS_DROP * abs(start):
        return LossTrend.FELL
    return LossTrend.ROSE if end - start > MIN_LOSS_RISE * abs(start) else LossTrend.FLAT


def finite_curve(trial: TrialFrame, metric: str) -> list[tuple[int, float]]:
    """Return a metric's points (step, value) that are finite."""
    return [(step, value) for step, value in trial.curves.curves.get(metric, []) if math.isfinite(value)]
