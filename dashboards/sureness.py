"""How sure the answer is, in words."""

from __future__ import annotations

from dashboards.certainty import Certainty, Difference
from dashboards.frame import brief, endings, signed, told
from dashboards.sweep_frame import SweepFrame

LISTED = 10


def nothing_yet(frame: SweepFrame) -> str:
    """Where a sweep stands of which no trial completed."""
    ends = endings(case.record for case in frame.trials)
    if not frame.trials:
        return "No trial has begun yet."
    if all(case.record.state.finished for case in frame.trials):
        return f"No trial completed: {told(ends)}. The reasons are below."
    return f"No trial has completed yet; {ends.get('running', 0)} running."


def how_sure(frame: SweepFrame, sure: Certainty) -> str:
    """Against the other trials, then against the start model."""
    return f"{_among_trials(frame, sure)}{_over_start(frame, sure)}"


def _over_start(frame: SweepFrame, sure: Certainty) -> str:
    against = sure.against_start
    if against is None:
        return ""
    if frame.sign * against.mean <= 0:
        return " The winner is no better than the start model."
    if against.clear:
        return " The winner is clearly better than the start model."
    return " The winner is not clearly better than the start model: the 95 % interval of its gain includes 0."


def _among_trials(frame: SweepFrame, sure: Certainty) -> str:
    if not sure.rivals:
        others = len(frame.ranked) - 1
        if others:
            return (
                f"How sure the ranking is cannot be told: {frame.goal.metric} is no mean over held-out pairs, or the "
                "trials' pairs are gone. Run the best few again with other values of training.seed."
            )
        return "Only one trial completed: there is nothing to compare it with but the start model."
    how = "bootstrap over the held-out pairs, all trials on the same ones" if sure.paired else "not paired, so too wide"
    rival, difference = sure.rivals[0]
    if len(sure.tied) == 1:
        return (
            f"Trial {sure.winner.label} is better than every other: the runner-up, trial {rival.label}, is behind by "
            f"{brief(abs(difference.mean))} ({interval(difference)}; {how})."
        )
    count = len(sure.tied)
    every = "The" if count == len(frame.ranked) else "These"
    listed = ", ".join(case.label for case in sure.tied[:LISTED]) + (" and more" if count > LISTED else "")
    return (
        f"{every} {count} configurations cannot be told apart: trials {listed}. The differences to the winner have "
        f"95 % intervals that include 0 ({how})."
    )


def interval(difference: Difference) -> str:
    """The 95 % interval in words."""
    return f"95 % interval {signed(difference.low)} … {signed(difference.high)}"
