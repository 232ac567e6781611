"""Preferences into a win rate, its interval, and what the order in which answers were shown does to it."""

from __future__ import annotations

import math
from collections.abc import Sequence
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


def win_rate(preferences: Sequence[tuple[str, float]]) -> Rate | None:
    """The mean over prompts of the mean over a prompt's samples, ties as halves; prompts are what was drawn, so the
    interval counts them and not the samples. `preferences`: prompt and preference; None without any.
    """
    if not preferences:
        return None
    by_prompt: dict[str, list[float]] = {}
    for prompt, preference in preferences:
        by_prompt.setdefault(prompt, []).append(preference)
    share = math.fsum(math.fsum(each) / len(each) for each in by_prompt.values()) / len(by_prompt)
    return wilson(min(1.0, max(0.0, share)), len(by_prompt))


def first_position(votes: Sequence[BothOrders]) -> tuple[Rate | None, float | None]:
    """The share of decided votes for the answer shown first (one half is no bias), and the share of pairs of which both
    orders say the same; None where there is none.
    """
    decided = [v for both in votes for v in (both.ours_first, both.ours_second) if v is not None and v != "tie"]
    agreed = [agree for both in votes if (agree := both.agree) is not None]
    first = wilson(sum(v == "first" for v in decided) / len(decided), len(decided)) if decided else None
    return first, sum(agreed) / len(agreed) if agreed else None
