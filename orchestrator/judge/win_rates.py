"""Preferences into a win rate, its interval, and what the order in which answers were shown does to it.

The length-controlled win rate of AlpacaEval 2: what the win rate would be if both answers were as long.

Source: Dubois, Galambosi, Liang, Hashimoto, "Length-Controlled AlpacaEval", 2024, and `length_controlled_v1` in
alpaca_eval's `metrics/glm_winrate.py`. As there: a logistic regression without intercept of the preference (0 to 1) on

- the model's term, 1 in every row;
- tanh of the difference in characters of the two answers, divided by its standard deviation (of the sample, n - 1);
- the prompt's difficulty, where it is known;

with an L1 penalty whose strength (ten values, 1e-4 to 1e4) is the best by log loss in five folds of prompts, fitted by
liblinear. The rate is the mean prediction over the prompts with the length's term put to 0.

What differs, because AlpacaEval's own files are about its 805 prompts and one baseline: difficulty is not looked up but
estimated from how the *other* judged trials fare on the prompt, smoothed log-odds, and only where there are at least
three of them; and no rows of the baseline told to be verbose or concise are added (weight 0.2 there). The interval is
ours: the fit, at the strength found, over draws of the prompts with replacement. Where that strength leaves nothing of
the model's term, as it does with few prompts, it says one half of any data: rate and interval are then of the weakest
penalty. Several samples of a prompt weigh together what one does.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from orchestrator.judge.judgements import Rate

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


Column = NDArray[np.float64]

FOLDS = 5
STRENGTHS = tuple(float(c) for c in np.logspace(-4, 4, 10))
RESAMPLES = 300
LEAST_OTHERS = 3
"""Judged trials beside the one in question, for the prompts' difficulty."""
_SEED = 0
_TAIL = 2.5
_EDGE = 1e-6
"""Preferences of 0 and 1 are this far inside: a class without any weight cannot be fitted."""


def length_controlled(
    preferences: Column, ours: Column, theirs: Column, prompts: Sequence[str], difficulty: Column | None = None
) -> Rate | None:
    """The length-controlled win rate, see above; None with fewer prompts than folds.

    All are of the same pairs of answers: `ours` and `theirs` their characters, `prompts` which ones are of one prompt.
    """
    places = {prompt: place for place, prompt in enumerate(dict.fromkeys(prompts))}
    groups, count = np.array([places[prompt] for prompt in prompts], dtype=np.int64), len(places)
    if count < FOLDS:
        return None
    each = (1 / np.bincount(groups))[groups]  # a prompt's samples weigh 1 together
    gaps = theirs - ours
    middle = float(np.average(gaps, weights=each))
    spread = float(np.sqrt(np.sum(each * (gaps - middle) ** 2) / (count - 1)))
    length = np.tanh(gaps / spread) if spread > 0 else np.zeros_like(gaps)
    terms = [length, np.ones_like(gaps)] + ([] if difficulty is None else [difficulty])
    design = np.stack(terms, axis=1)
    level = design.copy()
    level[:, 0] = 0.0
    strength = best_strength(design, preferences, each, groups)
    fitted = fit(design, preferences, each, strength)
    if fitted[1] == 0:  # shrunk to nothing: one half, whatever the data say
        strength = STRENGTHS[-1]
        fitted = fit(design, preferences, each, strength)
    value = _mean(level, fitted, each)
    rng = np.random.default_rng(_SEED)
    drawn: list[float] = []
    for _ in range(RESAMPLES):
        weights = each * rng.multinomial(count, np.full(count, 1 / count))[groups]
        drawn.append(_mean(level, fit(design, preferences, weights, strength), weights))
    low, high = (float(end) for end in np.percentile(drawn, [_TAIL, 100 - _TAIL]))
    return Rate(value=value, low=min(low, value), high=max(high, value))


def best_strength(design: Column, preferences: Column, weights: Column, groups: NDArray[Any]) -> float:
    """The penalty's inverse with the least log loss on prompts that were not fitted."""
    from sklearn.model_selection import GroupKFold

    def held_out_loss(rest: NDArray[Any], held: NDArray[Any], strength: float) -> float:
        fitted = fit(design[rest], preferences[rest], weights[rest], strength)
        return _log_loss(preferences[held], _logistic(design[held] @ fitted), weights[held])

    folds = list(GroupKFold(n_splits=FOLDS).split(design, groups=groups))
    losses = [np.mean([held_out_loss(rest, held, strength) for rest, held in folds]) for strength in STRENGTHS]
    return STRENGTHS[int(np.argmin(losses))]


def fit(design: Column, preferences: Column, weights: Column, strength: float) -> Column:
    """Coefficients. A preference of 0.7 is a row that won with weight 0.7 and one that lost with 0.3."""
    from sklearn import config_context
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    inside = np.clip(preferences, _EDGE, 1 - _EDGE)
    model = LogisticRegression(
        l1_ratio=1.0, C=strength, solver="liblinear", fit_intercept=False, tol=1e-6, max_iter=1000, random_state=123
    )
    rows, won = np.concatenate([design, design]), np.repeat([1, 0], len(design))
    with warnings.catch_warnings(), config_context(assume_finite=True, skip_parameter_validation=True):
        # Where one term tells wins from losses, the weakest penalties let it grow on and on: a rate of 1 all the same.
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(rows, won, sample_weight=np.concatenate([inside * weights, (1 - inside) * weights]))
    return np.asarray(model.coef_[0], dtype=np.float64)


def difficulty(others: Sequence[Sequence[tuple[str, float]]], prompts: Sequence[str]) -> Column | None:
    """How trials other than the one in question fare on each prompt, as log-odds with one win and one loss added; None
    where there are too few of them. `others`: of each, prompts with preferences.
    """
    if len(others) < LEAST_OTHERS:
        return None
    won: dict[str, float] = {}
    count: dict[str, int] = {}
    for told in others:
        for prompt, mean in prompt_means(told).items():
            won[prompt] = won.get(prompt, 0.0) + mean
            count[prompt] = count.get(prompt, 0) + 1
    return np.array([np.log((won.get(p, 0.0) + 1) / (count.get(p, 0) - won.get(p, 0.0) + 1)) for p in prompts])


def _mean(level: Column, coefficients: Column, weights: Column) -> float:
    return float(np.average(_logistic(level @ coefficients), weights=weights))


def _logistic(x: Column) -> Column:
    return np.exp(-np.logaddexp(0.0, -x))


def _log_loss(truth: Column, told: Column, weights: Column) -> float:
    inside = np.clip(told, 1e-15, 1 - 1e-15)
    return -float(np.average(truth * np.log(inside) + (1 - truth) * np.log(1 - inside), weights=weights))
