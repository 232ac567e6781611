"""Whether anything was learned at all.

What the held-out loss did: never moved, stood still, came up again, or only rose.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from dashboards.analysis.significance import Certainty
from dashboards.analysis.small_samples import FEW_PAIRS, FEWEST_ADVISED, pairs_needed, share_interval
from dashboards.analysis.sweep_frame import SweepFrame, TrialCase, show
from dashboards.diagnosis.findings import Finding, Level, rounded
from trainer.metrics import EVAL

ACCURACY = f"{EVAL}accuracies/logp"
NEAR_HALF = 0.6
"""An accuracy that lies below this in 95 of 100 cases is no better than a coin for any use."""


def worse_than_start(frame: SweepFrame, sure: Certainty) -> Iterator[Finding]:
    """Every complete trial is worse than where it began."""
    start, best = frame.start(frame.goal.metric), sure.winner.record.value
    if start is None or best is None or _gained(frame, sure.winner):
        return
    against = sure.against_start
    interval = ""
    if against is not None:
        interval = f" (95 % interval of the difference {show(against.low)} to {show(against.high)})"
    if against is not None and not against.clear and against.pairs <= FEW_PAIRS:
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
        Level.SERIOUS,
        "No trial is better than the start model",
        f"The best of {len(frame.ranked)} complete trials has {frame.goal.metric} = {show(best)}; the start model had "
        f"{show(start)}{interval}.",
        f"Do not ship any of these. {step}",
        (sure.winner.label,),
        "training.learning_rate",
    )


def _gained(frame: SweepFrame, winner: TrialCase) -> bool:
    """Whether it ended better than it began; unknown counts as yes."""
    start, best = frame.start(frame.goal.metric), winner.record.value
    return start is None or best is None or frame.sign * (best - start) > 0


def gain_not_clear(frame: SweepFrame, sure: Certainty) -> Iterator[Finding]:
    """The winner is ahead of the start model by less than these pairs can show."""
    against = sure.against_start
    if against is None or against.clear or frame.sign * against.mean <= 0:
        return
    needed = against.pairs_needed
    yield Finding(
        "gain_not_clear",
        Level.WARNING,
        "The winner is not clearly better than the start model",
        f"Trial {sure.winner.label}: {frame.goal.metric} differs from the start model's by {show(against.mean)}, 95 % "
        f"interval {show(against.low)} to {show(against.high)} over {against.pairs} held-out "
        f"{'pairs' if against.paired else 'examples, compared without pairing'}; it was picked as the best of "
        f"{len(frame.ranked)} on the same ones, so even that is flattering.",
        (f"Hold out about {rounded(needed)} pairs" if needed else "Hold out more pairs")
        + " before believing it, or train longer so that the gain grows.",
        (sure.winner.label,),
    )


def coin_toss(frame: SweepFrame, winner: TrialCase) -> Iterator[Finding]:
    """An accuracy that cannot be told from one half, of a trial that did get better: else `worse_than_start` speaks.

    With few pairs that says nothing about the trial, only about the number of pairs.
    """
    accuracy = winner.last(ACCURACY)
    count = len(winner.pairs) if winner.pairs is not None else 0 if frame.data is None else frame.data.eval_rows
    if accuracy is None or count == 0 or not _gained(frame, winner):
        return
    low, high = share_interval(accuracy, count)
    if low > 0.5:
        return
    evidence = (
        f"Trial {winner.label}: {ACCURACY} = {show(accuracy)} over {count} held-out pair{'s' if count > 1 else ''}, "
        f"95 % interval {low:.3f} to {high:.3f}; guessing gives 0.5."
    )
    hopeless = high < NEAR_HALF
    if not hopeless and count <= FEW_PAIRS:
        needed = pairs_needed(accuracy - 0.5, 0.5, count)
        yield Finding(
            "few_pairs",
            Level.WARNING,
            "Too few held-out pairs to tell whether the winner orders pairs better than by chance",
            evidence,
            (f"Hold out about {rounded(needed)} pairs" if needed else "Hold out more pairs")
            + " (data.eval_share, or a data.eval of its own) before judging the trials.",
            (winner.label,),
        )
        return
    yield Finding(
        "coin_toss",
        Level.SERIOUS if hopeless else Level.WARNING,
        f"The winner {'orders' if hopeless else 'may order'} pairs no better than a coin",
        evidence,
        "Raise the learning rate or train longer; if that does not help, look at the data: are chosen and rejected "
        "swapped, or too much alike?",
        (winner.label,),
        "training.learning_rate",
    )


def ties(winner: TrialCase) -> Iterator[Finding]:
    """Pairs whose two responses get exactly the same log-prob count as wrong."""
    if winner.pairs is None:
        return
    equal = int(np.sum(winner.pairs.gaps == 0))
    if equal < max(2, 0.01 * len(winner.pairs)):
        return
    yield Finding(
        "ties",
        Level.WARNING,
        "Some held-out pairs are ties, which count as wrong",
        f"Trial {winner.label}: {equal} of {len(winner.pairs)} pairs have exactly the same log-prob per token for "
        f"both responses, so no trial can reach an accuracy above {1 - equal / len(winner.pairs):.3f}.",
        "Both responses are probably equal after truncation: raise data.max_length, or remove those rows.",
        (winner.label,),
    )


LOSS = f"{EVAL}loss"
HARDLY = 0.02
"""A held-out loss that fell by less than this share of its start has hardly moved."""
FLAT = 0.1
"""A second half that brought less than this share of the whole fall was flat."""
RISES = 0.1
"""A loss that came up again by more than this share of its fall has turned."""
_EVALUATIONS = 4


def loss_plateau(winner: TrialCase) -> Iterator[Finding]:
    """A held-out loss that never moved, or that stood still for the second half."""
    course = _course(winner, LOSS)
    if len(course) < 3 or course[-1][0] == 0:
        return
    (_, start), (last, end) = course[0], course[-1]
    lowest = min(value for _, value in course)
    if _rose(course):
        return  # `overfitting` says so
    if start - lowest < HARDLY * abs(start):
        yield Finding(
            "loss_plateau",
            Level.WARNING,
            "The loss hardly moved",
            f"Trial {winner.label}: held-out loss {show(start)} at the start, {show(end)} after {last} updates; the "
            f"lowest was {show(lowest)}.",
            "Raise the learning rate by a factor of 3 or train longer; if the loss then jumps about, go half-way back.",
            (winner.label,),
            "training.learning_rate",
        )
        return
    if len(course) < _EVALUATIONS or _turned(course):
        return
    middle = min(value for step, value in course if step <= last / 2)
    if middle - lowest < FLAT * (start - lowest):
        at = next(step for step, value in course if value <= middle)
        yield Finding(
            "loss_plateau",
            Level.NOTE,
            f"The loss stood still after about {at} of {last} updates",
            f"Trial {winner.label}: held-out loss {show(start)} at the start, {show(middle)} by update {at}, "
            f"{show(end)} at the end. A schedule that decays to 0 flattens the last updates by itself.",
            f"About {at} updates are enough for comparing configurations: with fewer updates more of them can be "
            "tried. Train the chosen one longer afterwards.",
            (winner.label,),
            "training.max_steps",
        )


def overfitting(frame: SweepFrame, winner: TrialCase) -> Iterator[Finding]:
    """A held-out loss that fell and came up again: from there on the training pairs are learned by heart. Or that rose
    from the start on.
    """
    course = _course(winner, LOSS)
    rose = _rose(course)
    if not rose and not _turned(course):
        return
    at, lowest = min(course, key=lambda point: point[1])
    goal = _course(winner, frame.goal.metric)
    best_at, best = max(goal, key=lambda point: frame.sign * point[1]) if goal else (0, 0.0)
    fell = bool(goal) and frame.sign * (best - goal[-1][1]) > 0
    also = (
        f" {frame.goal.metric} was best at update {best_at} ({show(best)}) and ended at {show(goal[-1][1])}."
        if fell
        else f" {frame.goal.metric} did not suffer from it."
        if goal
        else ""
    )
    yield Finding(
        "overfitting",
        Level.WARNING if fell else Level.NOTE,
        "The held-out loss only rose" if rose else f"The held-out loss came up again after update {at}",
        f"Trial {winner.label}: {show(course[0][1])} at the start, "
        + ("" if rose else f"{show(lowest)} at update {at}, ")
        + f"{show(course[-1][1])} at the end.{also}",
        "Lower the learning rate, by a factor of 3 to begin with; if it rises all the same, check that the held-out "
        "pairs are like the training pairs."
        if rose
        else f"Train for about {at} updates, or with a lower learning rate.",
        (winner.label,),
        "training.learning_rate" if rose else "training.max_steps",
    )


def _rose(course: list[tuple[int, float]]) -> bool:
    """Whether it never came clearly below its start, and ended clearly above it."""
    if len(course) < 3:
        return False
    start, end, lowest = course[0][1], course[-1][1], min(value for _, value in course)
    return start - lowest < HARDLY * abs(start) < end - start


def _course(case: TrialCase, metric: str) -> list[tuple[int, float]]:
    return [(step, value) for step, value in case.view.courses.get(metric, []) if math.isfinite(value)]


def _turned(course: list[tuple[int, float]]) -> bool:
    """Whether the lowest value lies in the middle, well below both ends."""
    if len(course) < _EVALUATIONS:
        return False
    start, end, lowest = course[0][1], course[-1][1], min(value for _, value in course)
    return start - lowest >= HARDLY * abs(start) and end - lowest > RISES * (start - lowest)
