"""Rules about learning: nothing learned, no clear gain, a held-out loss that stands still or rises again."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from dashboards.analysis.significance import Significance
from dashboards.analysis.small_samples import FEW_PAIRS, FEWEST_ADVISED, pairs_needed, share_interval
from dashboards.analysis.sweep_frame import SweepFrame, TrialFrame, format_value
from dashboards.diagnosis.findings import Finding, FindingLevel, round_count
from trainer.metrics import EVAL

ACCURACY = f"{EVAL}accuracies/logp"
NEAR_HALF = 0.6
"""An accuracy that lies below this in 95 of 100 cases is no better than a coin for any use."""


def worse_than_initial(frame: SweepFrame, significance: Significance) -> Iterator[Finding]:
    """Every complete trial is worse than where it began."""
    start, best = frame.initial_value(frame.objective.metric), significance.winner.record.value
    if start is None or best is None or _improved(frame, significance.winner):
        return
    against = significance.against_initial
    interval = ""
    if against is not None:
        interval = f" (95 % interval of the difference {format_value(against.low)} to {format_value(against.high)})"
    if against is not None and not against.is_clear and against.pairs <= FEW_PAIRS:
        step = (
            f"{against.pairs} held-out pair{'s say' if against.pairs > 1 else ' says'} little either way: hold out "
            f"{FEWEST_ADVISED} or more before changing anything else."
        )
    elif best == start:
        step = "Nothing moved: raise the learning rate by a factor of 3 to 10, or train for more updates."
    else:
        step = "Try learning rates 3 and 10 times smaller, and check that the chosen responses are the better ones."
    yield Finding(
        "worse_than_start",
        FindingLevel.SERIOUS,
        "No trial is better than the start model",
        f"The best of {len(frame.ranked)} complete trials has {frame.objective.metric} = {format_value(best)}; "
        f"the start model had {format_value(start)}{interval}.",
        f"Do not ship any of these. {step}",
        (significance.winner.label,),
        "training.learning_rate",
    )


def _improved(frame: SweepFrame, winner: TrialFrame) -> bool:
    """Whether it ended better than it began; unknown counts as yes."""
    start, best = frame.initial_value(frame.objective.metric), winner.record.value
    return start is None or best is None or frame.sign * (best - start) > 0


def gain_not_clear(frame: SweepFrame, significance: Significance) -> Iterator[Finding]:
    """The winner is ahead of the initial model by less than these pairs can show."""
    against = significance.against_initial
    if against is None or against.is_clear or frame.sign * against.mean <= 0:
        return
    needed = against.pairs_needed
    yield Finding(
        "gain_not_clear",
        FindingLevel.WARNING,
        "The winner is not clearly better than the start model",
        f"Trial {significance.winner.label}: {frame.objective.metric} differs from the start model's by "
        f"{format_value(against.mean)}, 95 % interval {format_value(against.low)} to "
        f"{format_value(against.high)} over {against.pairs} held-out "
        f"{'pairs' if against.paired else 'examples, compared without pairing'}; it was picked as the best of "
        f"{len(frame.ranked)} on the same ones, so even that is flattering.",
        (f"Hold out about {round_count(needed)} pairs" if needed else "Hold out more pairs")
        + " before believing it, or train longer so that the gain grows.",
        (significance.winner.label,),
    )


def accuracy_at_chance(frame: SweepFrame, winner: TrialFrame) -> Iterator[Finding]:
    """An accuracy that cannot be told from one half, of a trial that did get better: else `worse_than_initial` speaks.

    With few pairs that says nothing about the trial, only about the number of pairs.
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
        f"pair{'s' if count > 1 else ''}, 95 % interval {low:.3f} to {high:.3f}; guessing gives 0.5."
    )
    hopeless = high < NEAR_HALF
    if not hopeless and count <= FEW_PAIRS:
        needed = pairs_needed(accuracy - 0.5, 0.5, count)
        yield Finding(
            "few_pairs",
            FindingLevel.WARNING,
            "Too few held-out pairs to tell whether the winner orders pairs better than by chance",
            evidence,
            (f"Hold out about {round_count(needed)} pairs" if needed else "Hold out more pairs")
            + " (data.eval_share, or a data.eval of its own) before judging the trials.",
            (winner.label,),
        )
        return
    yield Finding(
        "coin_toss",
        FindingLevel.SERIOUS if hopeless else FindingLevel.WARNING,
        f"The winner {'orders' if hopeless else 'may order'} pairs no better than a coin",
        evidence,
        "Raise the learning rate or train longer; if that does not help, look at the data: are chosen and rejected "
        "swapped, or too much alike?",
        (winner.label,),
        "training.learning_rate",
    )


def ties(winner: TrialFrame) -> Iterator[Finding]:
    """Pairs whose two responses get exactly the same log-prob count as wrong."""
    if winner.pairs is None:
        return
    equal = int(np.sum(winner.pairs.margins == 0))
    if equal < max(2, 0.01 * len(winner.pairs)):
        return
    yield Finding(
        "ties",
        FindingLevel.WARNING,
        "Some held-out pairs are ties, which count as wrong",
        f"Trial {winner.label}: {equal} of {len(winner.pairs)} pairs have exactly the same log-prob per token for "
        f"both responses, so no trial can reach an accuracy above {1 - equal / len(winner.pairs):.3f}.",
        "Both responses are probably equal after truncation: raise data.max_length, or remove those rows.",
        (winner.label,),
    )


LOSS = f"{EVAL}loss"
MIN_LOSS_CHANGE = 0.02
"""A held-out loss that fell by less than this share of its start has hardly moved."""
PLATEAU_FRACTION = 0.1
"""A second half that brought less than this share of the whole fall was flat."""
OVERFITTING_RISE = 0.1
"""A loss that came up again by more than this share of its fall has turned."""
_MIN_EVALUATIONS = 4


def loss_plateau(winner: TrialFrame) -> Iterator[Finding]:
    """A held-out loss that never moved, or that stood still for the second half."""
    curve = _curve(winner, LOSS)
    if len(curve) < 3 or curve[-1][0] == 0:
        return
    (_, start), (last, end) = curve[0], curve[-1]
    lowest = min(value for _, value in curve)
    if _only_rose(curve):
        return  # `overfitting` says so
    if start - lowest < MIN_LOSS_CHANGE * abs(start):
        yield Finding(
            "loss_plateau",
            FindingLevel.WARNING,
            "The loss hardly moved",
            f"Trial {winner.label}: held-out loss {format_value(start)} at the start, {format_value(end)} after {last} "
            f"updates; the lowest was {format_value(lowest)}.",
            "Raise the learning rate by a factor of 3 or train longer; if the loss then jumps about, go half-way back.",
            (winner.label,),
            "training.learning_rate",
        )
        return
    if len(curve) < _MIN_EVALUATIONS or _has_minimum_inside(curve):
        return
    middle = min(value for step, value in curve if step <= last / 2)
    if middle - lowest < PLATEAU_FRACTION * (start - lowest):
        at = next(step for step, value in curve if value <= middle)
        yield Finding(
            "loss_plateau",
            FindingLevel.NOTE,
            f"The loss stood still after about {at} of {last} updates",
            f"Trial {winner.label}: held-out loss {format_value(start)} at the start, {format_value(middle)} by update "
            f"{at}, {format_value(end)} at the end. A schedule that decays to 0 flattens the last updates by itself.",
            f"About {at} updates are enough for comparing configurations: with fewer updates more of them can be "
            "tried. Train the chosen one longer afterwards.",
            (winner.label,),
            "training.max_steps",
        )


def overfitting(frame: SweepFrame, winner: TrialFrame) -> Iterator[Finding]:
    """A held-out loss that fell and came up again: from there on the training pairs are learned by heart. Or that rose
    from the start on.
    """
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
        else f" {frame.objective.metric} did not suffer from it."
        if objective
        else ""
    )
    yield Finding(
        "overfitting",
        FindingLevel.WARNING if fell else FindingLevel.NOTE,
        "The held-out loss only rose" if rose else f"The held-out loss came up again after update {at}",
        f"Trial {winner.label}: {format_value(curve[0][1])} at the start, "
        + ("" if rose else f"{format_value(lowest)} at update {at}, ")
        + f"{format_value(curve[-1][1])} at the end.{also}",
        "Lower the learning rate, by a factor of 3 to begin with; if it rises all the same, check that the held-out "
        "pairs are like the training pairs."
        if rose
        else f"Train for about {at} updates, or with a lower learning rate.",
        (winner.label,),
        "training.learning_rate" if rose else "training.max_steps",
    )


def _only_rose(curve: list[tuple[int, float]]) -> bool:
    """Whether it never came clearly below its start, and ended clearly above it."""
    if len(curve) < 3:
        return False
    start, end, lowest = curve[0][1], curve[-1][1], min(value for _, value in curve)
    return start - lowest < MIN_LOSS_CHANGE * abs(start) < end - start


def _curve(trial: TrialFrame, metric: str) -> list[tuple[int, float]]:
    return [(step, value) for step, value in trial.curves.curves.get(metric, []) if math.isfinite(value)]


def _has_minimum_inside(curve: list[tuple[int, float]]) -> bool:
    """Whether the lowest value lies in the middle, well below both ends."""
    if len(curve) < _MIN_EVALUATIONS:
        return False
    start, end, lowest = curve[0][1], curve[-1][1], min(value for _, value in curve)
    return start - lowest >= MIN_LOSS_CHANGE * abs(start) and end - lowest > OVERFITTING_RISE * (start - lowest)
