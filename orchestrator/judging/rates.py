"""Preferences into a win rate, its interval, and what the order in which answers were shown does to it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from orchestrator.judging.verdict import Rate

Vote = Literal["first", "second", "tie"]

_Z = 1.959964


@dataclass(frozen=True, slots=True)
class BothOrders:
    """The votes on one pair: with the trial's answer shown first, and with it second. None: no verdict."""

    ours_first: Vote | None
    ours_second: Vote | None

    @property
    def preference(self) -> float | None:
        """How far the trial's answer is preferred, the mean of both orders; None unless both have a verdict."""
        if self.ours_first is None or self.ours_second is None:
            return None
        given = {"first": 1.0, "tie": 0.5, "second": 0.0}
        return (given[self.ours_first] + 1.0 - given[self.ours_second]) / 2

    @property
    def for_first(self) -> float | None:
        """The share of the decided votes that went to the answer shown first; None where neither is decided."""
        decided = [vote == "first" for vote in (self.ours_first, self.ours_second) if vote in ("first", "second")]
        return sum(decided) / len(decided) if decided else None

    @property
    def agree(self) -> bool | None:
        """Whether both orders prefer the same answer; None unless both have a verdict."""
        preference = self.preference
        return None if preference is None else preference in (0.0, 1.0) or self.ours_first == self.ours_second == "tie"


def wilson(share: float, count: int) -> Rate:
    """A share of `count` with Wilson's 95 % interval; with ties (halves) in it, the interval is wider than need be."""
    if count < 1 or not 0.0 <= share <= 1.0:
        raise ValueError(f"no share of {count} is {share}")
    square = _Z * _Z
    middle = (share + square / (2 * count)) / (1 + square / count)
    half = _Z / (1 + square / count) * math.sqrt(share * (1 - share) / count + square / (4 * count * count))
    return Rate(value=share, low=max(0.0, min(share, middle - half)), high=min(1.0, max(share, middle + half)))


def prompt_means(values: Iterable[tuple[str, float]]) -> dict[str, float]:
    """The mean of each prompt's values, in the order in which prompts come. Prompts are what was drawn: whatever is
    said of all of them weighs each alike, however many samples it has."""
    found: dict[str, list[float]] = {}
    for prompt, value in values:
        found.setdefault(prompt, []).append(value)
    return {prompt: math.fsum(each) / len(each) for prompt, each in found.items()}


def mean_over_prompts(values: Iterable[tuple[str, float]]) -> float | None:
    """The mean over prompts of each prompt's mean; None without any."""
    means = prompt_means(values).values()
    return math.fsum(means) / len(means) if means else None


def win_rate(preferences: Iterable[tuple[str, float]]) -> Rate | None:
    """The mean over prompts of the mean over a prompt's samples, ties as halves, with an interval that counts prompts.

    `preferences`: prompt and preference, in which both orders of a pair are one; None without any.
    """
    means = prompt_means(preferences).values()
    if not means:
        return None
    return wilson(min(1.0, max(0.0, math.fsum(means) / len(means))), len(means))


def first_position(votes: Sequence[tuple[str, BothOrders]]) -> tuple[Rate | None, float | None]:
    """The share of decided votes for the answer shown first (one half is no bias), and the share of pairs of which both
    orders say the same; None where there is none.

    `votes`: prompt and both orders' votes on one pair, which are one observation; each prompt weighs alike.
    """
    first = win_rate((prompt, share) for prompt, both in votes if (share := both.for_first) is not None)
    agreed = mean_over_prompts((prompt, float(agree)) for prompt, both in votes if (agree := both.agree) is not None)
    return first, agreed
