"""Rule about gain against distance: right answers that are lost with the distance from the initial model."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from dashboards.analysis.distance import find_distances
from dashboards.analysis.held_out_pairs import spearman
from dashboards.analysis.small_samples import is_clear_correlation
from dashboards.analysis.sweep_frame import SweepFrame
from dashboards.diagnosis.findings import DiagnosisFinding, FindingLevel
from orchestrator.spec.requirements import DEFAULT_BOUNDS
from trainer.metrics import EXACT_ANSWERS


def answers_fall_with_distance(frame: SweepFrame) -> Iterator[DiagnosisFinding]:
    """Report that trials further from the initial model have a better objective and answer fewer prompts right.

    Both rank correlations over the complete trials differ from 0 at the 5 % level. Not where the right answers decide
    already, as objective or by a bound that is not the default one, which allows them to fall.
    """
    bounds = {r.bound_text for r in frame.spec.require if r.metric == EXACT_ANSWERS} - {DEFAULT_BOUNDS[EXACT_ANSWERS]}
    decided = bool(bounds) or any(objective.metric == EXACT_ANSWERS for objective in frame.objectives)
    found = None if decided else find_distances(frame)
    if found is None:
        return
    rows = [
        (found.by_trial[trial.number], frame.sign * value, answers)
        for trial in frame.comparable_trials
        if trial.number in found.by_trial
        and (value := frame.value(trial)) is not None
        and (answers := trial.last(EXACT_ANSWERS)) is not None
    ]
    with_objective, with_answers = _correlations(rows)
    if with_objective is None or with_answers is None or with_objective <= 0 or with_answers >= 0:
        return
    if not is_clear_correlation(with_objective, len(rows)) or not is_clear_correlation(with_answers, len(rows)):
        return
    yield DiagnosisFinding(
        "answers_fall_with_distance",
        FindingLevel.WARNING,
        "Further from the initial model the objective improves and right answers fall",
        f"Over {len(rows)} complete trials the rank correlation of the distance ({found.name}) is "
        f"{with_objective:+.2f} with a better {frame.objective.metric} and {with_answers:+.2f} with {EXACT_ANSWERS}.",
        f'Write require: {{{EXACT_ANSWERS}: ">= initial"}}, so that no trial is the best at the cost of the task.',
    )


def _correlations(rows: list[tuple[float, float, float]]) -> tuple[float | None, float | None]:
    """Return the rank correlations of the distance with the objective (higher is better) and with right answers."""
    if not rows:
        return None, None
    distance, objective, answers = (np.array(column, dtype=np.float64) for column in zip(*rows, strict=True))
    return spearman(distance, objective), spearman(distance, answers)
