"""What the held-out loss did: never moved, stood still, came up again, or only rose."""

from __future__ import annotations

import math
from collections.abc import Iterator

from dashboards.diagnosis.finding import Finding, Level
from dashboards.frame import show
from dashboards.sweep_frame import SweepFrame, TrialCase
from trainer.metrics import EVAL

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
