"""How far trials went from the initial model, and which of them no other one beats in objective and distance.

Held-out accuracy follows the win rate near the initial model and parts from it far away (Chen et al., arXiv
2405.19534); for one gain, the trial with the smaller distance is the safer one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dashboards.analysis.sweep_frame import SweepFrame, TrialCurves, TrialFrame
from orchestrator.study.trial_records import TrialState
from trainer.metrics import CHOSEN, KL, LOG_RATIO_CHOSEN, LOG_RATIO_REJECTED, REJECTED

KL_NAME = "KL per token of greedy answers"
KL_COLUMN = "KL/token"
LOG_RATIO_NAME = "log-ratio per token of held-out pairs"


@dataclass(frozen=True, slots=True, eq=False)
class Distances:
    """Distances of complete trials from the initial model, in nats per token; all by the same measure."""

    name: str
    """KL_NAME, or LOG_RATIO_NAME where a trial has no KL."""
    by_trial: Mapping[int, float]
    """Trial number -> distance, at least 0."""
    front: tuple[TrialFrame, ...]
    """Trials that keep the requirements and that no other such trial beats in both; the closest first."""


def find_distances(frame: SweepFrame) -> Distances | None:
    """Return the distances of the complete trials that have one; None without any.

    The measure is `eval_kl_per_token` where every complete trial has it. Otherwise it is the mean of the absolute mean
    log-ratios per token of chosen and rejected held-out responses, which is known of sweeps of earlier versions too.
    """
    name, found = KL_NAME, {trial.number: kl for trial in frame.ranked if (kl := trial.last(KL)) is not None}
    if len(found) < len(frame.ranked):
        name = LOG_RATIO_NAME
        found = {t.number: ratio for t in frame.ranked if (ratio := _mean_log_ratio(t)) is not None}
    return Distances(name, found, _front(frame, found)) if found else None


def distance_column(rows: Sequence[TrialCurves]) -> tuple[str, list[float | None]]:
    """Return a table's name of the measure, as in `find_distances`, and the newest distance of each trial.

    Distances in nats per token, None where a trial has none; the name is empty where no trial has any.
    """
    complete = [row for row in rows if row.record.state is TrialState.COMPLETE]
    by_kl = bool(complete) and all(row.last(KL) is not None for row in complete)
    found = [row.last(KL) if by_kl else _log_ratio_of(row) for row in rows]
    return (KL_COLUMN if by_kl else "log-ratio") if any(value is not None for value in found) else "", found


def _log_ratio_of(row: TrialCurves) -> float | None:
    known = [abs(v) for v in (row.last(LOG_RATIO_CHOSEN), row.last(LOG_RATIO_REJECTED)) if v is not None]
    return sum(known) / len(known) if known else None


def log_ratio(trial: TrialFrame, metric: str) -> float | None:
    """Return the mean log-ratio per token to the initial model; None where not measured.

    Args:
        trial: the trial.
        metric: LOG_RATIO_CHOSEN or LOG_RATIO_REJECTED.

    Returns:
        The metric; where an earlier version did not log it, the change of the log-prob per token, which is equal.
    """
    logged = trial.last(metric)
    return trial.change({LOG_RATIO_CHOSEN: CHOSEN, LOG_RATIO_REJECTED: REJECTED}[metric]) if logged is None else logged


def _mean_log_ratio(trial: TrialFrame) -> float | None:
    ratios = [log_ratio(trial, LOG_RATIO_CHOSEN), log_ratio(trial, LOG_RATIO_REJECTED)]
    known = [abs(ratio) for ratio in ratios if ratio is not None]
    return sum(known) / len(known) if known else None


def _front(frame: SweepFrame, distances: Mapping[int, float]) -> tuple[TrialFrame, ...]:
    """Return the non-dominated trials: each has a better objective than all that are as close or closer."""
    candidates = [
        (distances[trial.number], -frame.sign * value, trial.number, trial)
        for trial in frame.eligible
        if trial.number in distances and (value := frame.value(trial)) is not None
    ]
    front: list[TrialFrame] = []
    best: float | None = None
    for _, loss, _, trial in sorted(candidates, key=lambda row: row[:3]):
        if best is None or loss < best:
            best = loss
            front.append(trial)
    return tuple(front)
