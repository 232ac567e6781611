"""Rules about training: no gain over the initial model, accuracy at chance, loss plateau, overfitting."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from dashboards.analysis.significance import Significance
from dashboards.analysis.small_samples import MIN_RECOMMENDED_PAIRS, SMALL_SAMPLE_PAIRS, pairs_needed, share_interval
from dashboards.analysis.sweep_frame import SweepFrame, TrialFrame
from dashboards.diagnosis.findings import DiagnosisFinding, FindingLevel, round_count
from dashboards.formatting import format_value
from trainer.metrics import EVAL

ACCURACY = f"{EVAL}accuracies/logp"
NEAR_HALF = 0.6
"""Accuracy. Where the upper end of its 95 % interval is below this, the trial counts as no better than chance."""


def worse_than_initial(frame: SweepFrame, significance: Significance) -> Iterator[DiagnosisFinding]:
    """Report that no complete trial improved the objective over the initial model."""
    start, best = frame.initial_value(frame.objective.metric), significance.winner.record.value
    if start is None or best is None or _improved(frame, significance.winner):
        return
    against = significance.against_initial
    interval = ""
    if against is not None:
        interval = f" (95 % interval of the difference {format_value(against.low)} to {format_value(against.high)})"
    if against is not None and not against.is_clear and against.pairs <= SMALL_SAMPLE_PAIRS:
        step = (
            f"{against.pairs} held-out pair{'s are' if against.pairs > 1 else ' is'} too few to decide: hold out "
            f"{MIN_RECOMMENDED_PAIRS} or more before changing anything else."
        )
    elif best == start:
        step = "The objective did not change: raise the learning rate by a factor of 3 to 10, or train longer."
    else:
        step = "Try learning rates 3 and 10 times smaller, and check that the chosen responses are the better ones."
    yield DiagnosisFinding(
        "worse_than_start",
        FindingLevel.SERIOUS,
        "No trial is better than the initial model",
        f"The best of {len(frame.ranked)} complete trials has {frame.objective.metric} = {format_value(best)}; "
        f"the initial model has {format_value(start)}{interval}.",
        f"Do not use any of these trials. {step}",
        (significance.winner.label,),
        "training.learning_rate",
    )


def _improved(frame: SweepFrame, winner: TrialFrame) -> bool:
    """Return whether the winner is better than the initial model; True where unknown."""
    start, best = frame.initial_value(frame.objective.metric), winner.record.value
    return start is None or best is None or frame.sign * (best - start) > 0


def gain_not_clear(frame: SweepFrame, significance: Significance) -> Iterator[DiagnosisFinding]:
    """Report a gain over the initial model that is not significant on these held-out pairs."""
    against = significance.against_initial
    if against is None or against.is_clear or frame.sign * against.mean <= 0:
        return
    required = against.pairs_needed
    yield DiagnosisFinding(
        "gain_not_clear",
        FindingLevel.WARNING,
        "The winner is not clearly better than the initial model",
        f"Trial {significance.winner.label}: {frame.objective.metric} differs from the initial model's by "
        f"{format_value(against.mean)}, 95 % interval {format_value(against.low)} to "
        f"{format_value(against.high)} over {against.pairs} held-out "
        f"{'pairs' if against.paired else 'examples, compared without pairing'}; selecting the best of "
        f"{len(frame.ranked)} trials on the same pairs biases this gain upwards.",
        (f"Hold out about {round_count(required)} pairs" if required else "Hold out more pairs")
        + " to confirm it, or train longer so that the gain grows.",
        (significance.winner.label,),
    )


def accuracy_at_chance(frame: SweepFrame, winner: TrialFrame) -> Iterator[DiagnosisFinding]:
    """Report an accuracy that does not differ significantly from 0.5.

    Only for a winner that improved; otherwise `worse_than_initial` reports. With few pairs the finding is about the
    number of pairs.
    """
    accuracy = winner.last(ACCURACY)
    count = len(winner.pairs) if winner.pairs is not None else 0 if frame.data is None else frame.data.eval_rows
    if accuracy is None or count == 0 or not _improved(frame, winner):
        return
    low, high = share_interval(accuracy, count)
    if low > 0.5:
        return
    evidence = (
        f"Trial {winner.label}: {ACCURACY} = {format_value(accuracy)} over {count} held-out "
        f"pair{'s' if count > 1 else ''}, 95 % interval {low:.3f} to {high:.3f}; chance is 0.5."
    )
    at_chance = high < NEAR_HALF
    if not at_chance and count <= SMALL_SAMPLE_PAIRS:
        required = pairs_needed(accuracy - 0.5, 0.5, count)
        yield DiagnosisFinding(
            "few_pairs",
            FindingLevel.WARNING,
            "Too few held-out pairs to decide whether the winner's accuracy is above chance",
            evidence,
            (f"Hold out about {round_count(required)} pairs" if required else "Hold out more pairs")
            + " (data.eval_share, or a separate data.eval) before comparing the trials.",
            (winner.label,),
        )
        return
    yield DiagnosisFinding(
        "coin_toss",
        FindingLevel.SERIOUS if at_chance else FindingLevel.WARNING,
        f"The winner's accuracy {'is' if at_chance else 'may be'} no better than chance",
        evidence,
        "Raise the learning rate or train longer; if that does not help, check the data: chosen and rejected may be "
        "swapped or too similar.",
        (winner.label,),
        "training.learning_rate",
    )


def ties(winner: TrialFrame) -> Iterator[DiagnosisFinding]:
    """Report held-out pairs whose responses have exactly the same log-prob per token; they count as wrong."""
    if winner.pairs is None:
        return
    tied = int(np.sum(winner.pairs.margins == 0))
    if tied < max(2, 0.01 * len(winner.pairs)):
        return
    yield DiagnosisFinding(
        "ties",
        FindingLevel.WARNING,
        "Some held-out pairs are ties, which count as wrong",
        f"Trial {winner.label}: {tied} of {len(winner.pairs)} pairs have exactly the same log-prob per token for "
        f"both responses, so no trial can reach an accuracy above {1 - tied / len(winner.pairs):.3f}.",
        "Both responses are probably equal after truncation: raise data.max_length, or remove those rows.",
        (winner.label,),
    )


LOSS = f"{EVAL}loss"
MIN_LOSS_CHANGE = 0.02
"""Share of the initial held-out loss. A smaller drop counts as no change."""
PLATEAU_FRACTION = 0.1
"""Share of the total drop. A second half with a smaller drop counts as a plateau."""
OVERFITTING_RISE = 0.1
"""Share of the total drop. A later rise by more than this counts as overfitting."""
_MIN_EVALUATIONS = 4


def loss_plateau(winner: TrialFrame) -> Iterator[DiagnosisFinding]:
    """Report a held-out loss that hardly changed, or that was flat in the second half."""
    curve = _curve(winner, LOSS)
    if len(curve) < 3 or curve[-1][0] == 0:
        return
    (_, start), (last, end) = curve[0], curve[-1]
    lowest = min(value for _, value in curve)
    if _only_rose(curve):
        return  # reported by `overfitting`
    if start - lowest < MIN_LOSS_CHANGE * abs(start):
        yield DiagnosisFinding(
            "loss_plateau",
            FindingLevel.WARNING,
            "The loss hardly changed",
            f"Trial {winner.label}: held-out loss {format_value(start)} at step 0, {format_value(end)} after {last} "
            f"updates; the lowest was {format_value(lowest)}.",
            "Raise the learning rate by a factor of 3 or train longer; if the loss then oscillates, raise it less.",
            (winner.label,),
            "training.learning_rate",
        )
        return
    if len(curve) < _MIN_EVALUATIONS or _has_minimum_inside(curve):
        return
    middle = min(value for step, value in curve if step <= last / 2)
    if middle - lowest < PLATEAU_FRACTION * (start - lowest):
        at = next(step for step, value in curve if value <= middle)
        yield DiagnosisFinding(
            "loss_plateau",
            FindingLevel.NOTE,
            f"The loss was flat after about {at} of {last} updates",
            f"Trial {winner.label}: held-out loss {format_value(start)} at step 0, {format_value(middle)} by update "
            f"{at}, {format_value(end)} at the end. A learning rate that decays to 0 also flattens the last updates.",
            f"About {at} updates are enough to compare configurations, which leaves time for more trials. Train the "
            "chosen one longer afterwards.",
            (winner.label,),
            "training.max_steps",
        )


def overfitting(frame: SweepFrame, winner: TrialFrame) -> Iterator[DiagnosisFinding]:
    """Report a held-out loss that rose again after its minimum (overfitting), or that only rose."""
    curve = _curve(winner, LOSS)
    rose = _only_rose(curve)
    if not rose and not _has_minimum_inside(curve):
        return
    at, lowest = min(curve, key=lambda point: point[1])
    objective = _curve(winner, frame.objective.metric)
    best_at, best = max(objective, key=lambda point: frame.sign * point[1]) if objective else (0, 0.0)
    fell = bool(objective) and frame.sign * (best - objective[-1][1]) > 0
    also = (
        f" {frame.objective.metric} was best at update {best_at} ({format_value(best)}) "
        f"and ended at {format_value(objective[-1][1])}."
        if fell
        else f" {frame.objective.metric} did not get worse."
        if objective
        else ""
    )
    yield DiagnosisFinding(
        "overfitting",
        FindingLevel.WARNING if fell else FindingLevel.NOTE,
        "The held-out loss only rose" if rose else f"The held-out loss rose again after update {at}",
        f"Trial {winner.label}: {format_value(curve[0][1])} at step 0, "
        + ("" if rose else f"{format_value(lowest)} at update {at}, ")
        + f"{format_value(curve[-1][1])} at the end.{also}",
        "Lower the learning rate by a factor of 3; if the loss still rises, check that the held-out pairs come from "
        "the same distribution as the training pairs."
        if rose
        else f"Train for about {at} updates, or with a lower learning rate.",
        (winner.label,),
        "training.learning_rate" if rose else "training.max_steps",
    )


def _only_rose(curve: list[tuple[int, float]]) -> bool:
    """Return whether the curve never fell clearly below its first value and ended clearly above it."""
    if len(curve) < 3:
        return False
    start, end, lowest = curve[0][1], curve[-1][1], min(value for _, value in curve)
    return start - lowest < MIN_LOSS_CHANGE * abs(start) < end - start


def _curve(trial: TrialFrame, metric: str) -> list[tuple[int, float]]:
    return [(step, value) for step, value in trial.curves.curves.get(metric, []) if math.isfinite(value)]


def _has_minimum_inside(curve: list[tuple[int, float]]) -> bool:
    """Return whether the curve has its minimum clearly below both ends."""
    if len(curve) < _MIN_EVALUATIONS:
        return False
    start, end, lowest = curve[0][1], curve[-1][1], min(value for _, value in curve)
    return start - lowest >= MIN_LOSS_CHANGE * abs(start) and end - lowest > OVERFITTING_RISE * (start - lowest)
