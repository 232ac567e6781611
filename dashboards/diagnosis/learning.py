"""Whether anything was learned, and when it stopped."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from dashboards.certainty import Certainty
from dashboards.diagnosis.finding import Finding, Level
from dashboards.frame import show
from dashboards.sweep_frame import SweepFrame, TrialCase
from trainer.metrics import EVAL

LOSS = f"{EVAL}loss"
ACCURACY = f"{EVAL}accuracies/logp"
HARDLY = 0.02
"""A held-out loss that fell by less than this share of its start has hardly moved."""
FLAT = 0.1
"""A second half that brought less than this share of the whole fall was flat."""
_EVALUATIONS = 4


def worse_than_start(frame: SweepFrame, sure: Certainty) -> Iterator[Finding]:
    """Every complete trial is worse than where it began."""
    start, best = frame.start(frame.goal.metric), sure.winner.record.value
    if start is None or best is None or frame.sign * (best - start) > 0:
        return
    interval = ""
    if sure.against_start is not None:
        against = sure.against_start
        interval = f" (95 % interval of the difference {show(against.low)} to {show(against.high)})"
    equal = best == start
    yield Finding(
        "worse_than_start",
        Level.SERIOUS,
        "No trial is better than the start model",
        f"The best of {len(frame.ranked)} complete trials has {frame.goal.metric} = {show(best)}; the start model had "
        f"{show(start)}{interval}.",
        "Do not ship any of these. "
        + (
            "Nothing moved: raise the learning rate by a factor of 3 to 10, or train for more updates."
            if equal
            else "Try learning rates 3 and 10 times smaller, and check that the chosen responses are the better ones."
        ),
        (sure.winner.label,),
        "training.learning_rate",
    )


def coin_toss(frame: SweepFrame, winner: TrialCase) -> Iterator[Finding]:
    """An accuracy that cannot be told from one half."""
    accuracy = winner.last(ACCURACY)
    count = len(winner.pairs) if winner.pairs is not None else 0 if frame.data is None else frame.data.eval_rows
    if accuracy is None or count == 0:
        return
    spread = 1.96 * math.sqrt(0.25 / count)
    if accuracy - 0.5 > spread:
        return
    yield Finding(
        "coin_toss",
        Level.SERIOUS,
        "The winner orders pairs no better than a coin",
        f"Trial {winner.label}: {ACCURACY} = {show(accuracy)} over {count} held-out pairs; guessing gives "
        f"{0.5 - spread:.3f} to {0.5 + spread:.3f} in 95 of 100 cases.",
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


def loss_plateau(winner: TrialCase) -> Iterator[Finding]:
    """A held-out loss that never moved, or that stood still for the second half."""
    course = [(step, value) for step, value in winner.view.courses.get(LOSS, []) if math.isfinite(value)]
    if len(course) < 3 or course[-1][0] == 0:
        return
    (_, start), (last, end) = course[0], course[-1]
    lowest = min(value for _, value in course)
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
    if len(course) < _EVALUATIONS:
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
