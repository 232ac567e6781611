"""Rules about gain against distance: a closer trial that is as good, and answers that are lost with the distance."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from dashboards.analysis.distance import find_distances
from dashboards.analysis.held_out_pairs import spearman
from dashboards.analysis.significance import Significance
from dashboards.analysis.small_samples import is_clear_correlation
from dashboards.analysis.sweep_frame import SweepFrame, TrialFrame
from dashboards.diagnosis.collapse_rules import CHOSEN_DROP, EXACT_DROP
from dashboards.diagnosis.findings import Advice, DiagnosisFinding, FindingLevel
from dashboards.formatting import format_brief, format_value
from trainer.metrics import CHOSEN, EXACT_ANSWERS

MIN_DISTANCE = 0.05
"""Nats per token. A winner within this distance counts as close: an answer of 20 tokens then differs by one nat."""
MUCH_CLOSER = 0.5
"""Share of the winner's distance. A trial at most this far counts as much closer."""


def closer_trial(frame: SweepFrame, significance: Significance) -> Iterator[DiagnosisFinding]:
    """Report a trial that is not distinguishable from the winner and much closer to the initial model.

    Only where the winner's gain over the initial model is clear; of several such trials the best, among equal ones the
    closest.
    """
    winner, found = significance.winner, find_distances(frame)
    against = significance.against_initial
    if found is None or against is None or not against.is_clear or frame.sign * against.mean <= 0:
        return
    far = found.by_trial.get(winner.number)
    if far is None or far < MIN_DISTANCE:
        return
    start = frame.initial_value(frame.objective.metric)
    closer = [
        (-frame.sign * (frame.value(trial) or 0.0), found.by_trial[trial.number], trial)
        for trial in significance.not_distinguishable[1:]
        if found.by_trial.get(trial.number, far) <= MUCH_CLOSER * far and _is_sound(frame, trial, start)
    ]
    if not closer:
        return
    _, near, chosen = min(closer, key=lambda row: row[:2])
    yield DiagnosisFinding(
        "closer_trial",
        FindingLevel.WARNING,
        f"Trial {chosen.label} is as good as the winner and much closer to the initial model",
        f"{found.name}: {format_brief(near)} nats for trial {chosen.label}, "
        f"{format_brief(far)} for the winner, trial {winner.label}; {frame.objective.metric} "
        f"{format_value(frame.value(chosen))} and {format_value(frame.value(winner))}, not distinguishable on the "
        "held-out pairs.",
        "Far from the initial model a held-out accuracy says less about the answers (arXiv 2405.19534).",
        (chosen.label,),
        steps=(Advice(f"use trial {chosen.label} instead of the winner", uses_model=True),),
    )


def _is_sound(frame: SweepFrame, trial: TrialFrame, start: float | None) -> bool:
    """Return whether the trial gains over the initial model and neither loses answers nor likely chosen responses."""
    value, answers, chosen = frame.value(trial), trial.change(EXACT_ANSWERS), trial.change(CHOSEN)
    gains = value is not None and (start is None or frame.sign * (value - start) > 0)
    return gains and (answers is None or answers > -EXACT_DROP) and (chosen is None or chosen >= -CHOSEN_DROP)


def answers_fall_with_distance(frame: SweepFrame) -> Iterator[DiagnosisFinding]:
    """Report that trials further from the initial model have a better objective and answer fewer prompts right.

    Both rank correlations over the complete trials differ from 0 at the 5 % level. Not where the right answers decide
    already, as objective or as requirement.
    """
    decisive = {objective.metric for objective in frame.objectives} | {r.metric for r in frame.spec.require}
    found = None if EXACT_ANSWERS in decisive else find_distances(frame)
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
