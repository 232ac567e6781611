"""Win rate, its Wilson interval, position bias and length-controlled win rate of a judge's preferences.

Length-controlled win rate (AlpacaEval 2): the expected win rate if both answers had the same length.

Source: Dubois, Galambosi, Liang, Hashimoto, "Length-Controlled AlpacaEval", 2024, and `length_controlled_v1` in
alpaca_eval's `metrics/glm_winrate.py`. As there: a logistic regression without intercept of the preference (0 to 1) on

- the model's term, 1 in every row;
- tanh of the difference in characters of the two answers, divided by its standard deviation (of the sample, n - 1);
- the prompt's difficulty, if it can be estimated;

with an L1 penalty whose strength (ten values, 1e-4 to 1e4) is the best by log loss in five folds of prompts, fitted by
liblinear. The rate is the mean prediction over the prompts with the length term set to 0.

Differences from AlpacaEval, whose files are about its 805 prompts and one baseline:

1. Difficulty is estimated as smoothed log-odds from the preferences of at least three *other* judged trials on the
   prompt.
2. No rows of a verbose or concise baseline are added (weight 0.2 there).
3. The interval, which AlpacaEval does not have, is a bootstrap over prompts at the chosen strength, and at least as
   wide as Wilson's: resamples of ties alone are all alike, which says nothing about further prompts.
4. If that strength removes the model's term, as with few prompts, the rate would always be 0.5: then the rate is that
   of the weakest penalty. If it does so in a resample, the interval would end at 0.5: then so is the interval.
5. The samples of a prompt have a total weight of 1.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from orchestrator.judge.judgements import Judgement, Rate

Vote = Literal["first", "second", "tie"]

_Z = 1.959964


@dataclass(frozen=True, slots=True)
class VotePair:
    """The votes on one pair, with the trial's answer shown first and second. None: no vote."""

    trial_first: Vote | None
    trial_second: Vote | None

    @property
    def preference(self) -> float | None:
        """Preference for the trial's answer from 0 to 1, the mean of both orders; None unless both have a vote."""
        if self.trial_first is None or self.trial_second is None:
            return None
        for_first = {"first": 1.0, "tie": 0.5, "second": 0.0}
        return (for_first[self.trial_first] + 1.0 - for_first[self.trial_second]) / 2

    @property
    def for_first(self) -> float | None:
        """Share of the decided votes for the answer shown first; None if neither vote is decided."""
        decided = [vote == "first" for vote in (self.trial_first, self.trial_second) if vote in ("first", "second")]
        return sum(decided) / len(decided) if decided else None

    @property
    def is_consistent(self) -> bool | None:
        """Whether both orders prefer the same answer; None unless both have a vote."""
        preference = self.preference
        return (
            None if preference is None else preference in (0.0, 1.0) or self.trial_first == self.trial_second == "tie"
        )


def wilson(share: float, count: int, comparisons: int = 1) -> Rate:
    """Return a share of `count` with Wilson's 95 % interval, which is conservative if ties count half.

    `comparisons`: number of such intervals that hold together (Bonferroni).

    Raises ValueError if `share` is not in [0, 1] or `count` below 1.
    """
    if count < 1 or not 0.0 <= share <= 1.0:
        raise ValueError(f"{share} is not a share of {count}")
    z = _Z if comparisons == 1 else NormalDist().inv_cdf(1 - 0.025 / comparisons)
    square = z * z
    middle = (share + square / (2 * count)) / (1 + square / count)
    half = z / (1 + square / count) * math.sqrt(share * (1 - share) / count + square / (4 * count * count))
    return Rate(value=share, low=max(0.0, min(share, middle - half)), high=min(1.0, max(share, middle + half)))


def joint_win_rate(judgement: Judgement, judged: Iterable[Judgement]) -> tuple[Rate, int]:
    """Return a judgement's win rate with the interval that holds for all trials of this judge, and their number.

    Args:
        judgement: a judgement with a win rate.
        judged: all judgements of the sweep.

    Raises:
        ValueError: the judgement has no win rate.
    """
    if judgement.win_rate is None:
        raise ValueError(f"trial {judgement.trial} has no win rate")
    count = max(1, sum((j.key, j.judge_name) == (judgement.key, judgement.judge_name) for j in judged))
    return wilson(judgement.win_rate.value, judgement.prompts, count), count


def prompt_means(values: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Return the mean of each prompt's values, in order of first occurrence.

    Statistics over prompts weigh each prompt alike, whatever its number of samples.
    """
    found: dict[str, list[float]] = {}
    for prompt, value in values:
        found.setdefault(prompt, []).append(value)
    return {prompt: math.fsum(each) / len(each) for prompt, each in found.items()}


def mean_over_prompts(values: Iterable[tuple[str, float]]) -> float | None:
    """Return the mean over prompts of each prompt's mean; None without any value."""
    means = prompt_means(values).values()
    return math.fsum(means) / len(means) if means else None


def win_rate(preferences: Iterable[tuple[str, float]]) -> Rate | None:
    """Return the win rate: the mean over prompts of the mean over samples, ties as halves; None without any value.

    `preferences`: prompt and preference from 0 to 1, both orders of a pair combined. The interval counts prompts.
    """
    means = prompt_means(preferences).values()
    if not means:
        return None
    return wilson(min(1.0, max(0.0, math.fsum(means) / len(means))), len(means))


def first_position(votes: Sequence[tuple[str, VotePair]]) -> tuple[Rate | None, float | None]:
    """Return the position bias: the share of decided votes for the answer shown first (0.5: no bias), and the
    share of pairs with the same vote in both orders; None without votes.

    `votes`: prompt and the votes on one pair, which are one observation; each prompt weighs alike.
    """
    first = win_rate((prompt, share) for prompt, both in votes if (share := both.for_first) is not None)
    agreed = mean_over_prompts(
        (prompt, float(agree)) for prompt, both in votes if (agree := both.is_consistent) is not None
    )
    return first, agreed


Column = NDArray[np.float64]

FOLDS = 5
STRENGTHS = tuple(float(c) for c in np.logspace(-4, 4, 10))
RESAMPLES = 300
MIN_OTHER_TRIALS = 3
"""Other judged trials needed to estimate the prompts' difficulty."""
_SEED = 0
_TAIL = 2.5
_MIN_PROBABILITY = 1e-6
"""Preferences are clipped to this distance from 0 and 1, as a class without weight cannot be fitted."""


def length_controlled(
    preferences: Column,
    trial_lengths: Column,
    initial_lengths: Column,
    prompts: Sequence[str],
    difficulty: Column | None = None,
) -> Rate | None:
    """Return the length-controlled win rate (see the module's docstring); None with fewer prompts than folds.

    Args:
        preferences: Preference for the trial's answer, from 0 to 1, of each pair.
        trial_lengths: Characters of the trial's answer of each pair.
        initial_lengths: Characters of the initial model's answer of each pair.
        prompts: Prompt of each pair.
        difficulty: The prompt's difficulty of each pair, as log-odds; None if unknown.
    """
    positions = {prompt: position for position, prompt in enumerate(dict.fromkeys(prompts))}
    groups, count = np.array([positions[prompt] for prompt in prompts], dtype=np.int64), len(positions)
    if count < FOLDS:
        return None
    prompt_weights = (1 / np.bincount(groups))[groups]  # total weight of a prompt's samples: 1
    margins = initial_lengths - trial_lengths
    middle = float(np.average(margins, weights=prompt_weights))
    spread = float(np.sqrt(np.sum(prompt_weights * (margins - middle) ** 2) / (count - 1)))
    length = np.tanh(margins / spread) if spread > 0 else np.zeros_like(margins)
    terms = [length, np.ones_like(margins)] + ([] if difficulty is None else [difficulty])
    design = np.stack(terms, axis=1)
    equal_length_design = design.copy()
    equal_length_design[:, 0] = 0.0
    strength = best_strength(design, preferences, prompt_weights, groups)
    fitted = fit_logistic(design, preferences, prompt_weights, strength)
    if fitted[1] == 0:  # removed by the penalty: the rate would always be 0.5
        strength = STRENGTHS[-1]
        fitted = fit_logistic(design, preferences, prompt_weights, strength)
    value = _mean(equal_length_design, fitted, prompt_weights)
    rng = np.random.default_rng(_SEED)
    resampled = [prompt_weights * rng.multinomial(count, np.full(count, 1 / count))[groups] for _ in range(RESAMPLES)]
    fits = [fit_logistic(design, preferences, weights, strength) for weights in resampled]
    if any(coefficients[1] == 0 for coefficients in fits):  # no resample would be on the other side of 0.5
        fits = [fit_logistic(design, preferences, weights, STRENGTHS[-1]) for weights in resampled]
    sampled = [_mean(equal_length_design, *each) for each in zip(fits, resampled, strict=True)]
    low, high = (float(end) for end in np.percentile(sampled, [_TAIL, 100 - _TAIL]))
    prompts_only = wilson(min(1.0, max(0.0, value)), count)
    return Rate(value=value, low=min(low, prompts_only.low), high=max(high, prompts_only.high))


def best_strength(design: Column, preferences: Column, weights: Column, groups: NDArray[Any]) -> float:
    """Return the inverse penalty with the lowest log loss in cross-validation over folds of prompts."""
    from sklearn.model_selection import GroupKFold

    def held_out_loss(train: NDArray[Any], test: NDArray[Any], strength: float) -> float:
        fitted = fit_logistic(design[train], preferences[train], weights[train], strength)
        return _log_loss(preferences[test], _logistic(design[test] @ fitted), weights[test])

    folds = list(GroupKFold(n_splits=FOLDS).split(design, groups=groups))
    losses = [np.mean([held_out_loss(train, test, strength) for train, test in folds]) for strength in STRENGTHS]
    return STRENGTHS[int(np.argmin(losses))]


def fit_logistic(design: Column, preferences: Column, weights: Column, strength: float) -> Column:
    """Return the coefficients. A preference of 0.7 is a win with weight 0.7 and a loss with weight 0.3."""
    from sklearn import config_context
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    inside = np.clip(preferences, _MIN_PROBABILITY, 1 - _MIN_PROBABILITY)
    model = LogisticRegression(
        l1_ratio=1.0, C=strength, solver="liblinear", fit_intercept=False, tol=1e-6, max_iter=1000, random_state=123
    )
    rows, won = np.concatenate([design, design]), np.repeat([1, 0], len(design))
    with warnings.catch_warnings(), config_context(assume_finite=True, skip_parameter_validation=True):
        # If a term separates wins from losses, it diverges under weak penalties; the rate is 1 nevertheless.
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(rows, won, sample_weight=np.concatenate([inside * weights, (1 - inside) * weights]))
    return np.asarray(model.coef_[0], dtype=np.float64)


def prompt_difficulty(others: Sequence[Sequence[tuple[str, float]]], prompts: Sequence[str]) -> Column | None:
    """Return each prompt's difficulty: log-odds of other trials' wins, with one win and one loss added.

    `others`: prompts with preferences of each other trial; None with fewer than MIN_OTHER_TRIALS.
    """
    if len(others) < MIN_OTHER_TRIALS:
        return None
    won: dict[str, float] = {}
    count: dict[str, int] = {}
    for preferences in others:
        for prompt, mean in prompt_means(preferences).items():
            won[prompt] = won.get(prompt, 0.0) + mean
            count[prompt] = count.get(prompt, 0) + 1
    return np.array([np.log((won.get(p, 0.0) + 1) / (count.get(p, 0) - won.get(p, 0.0) + 1)) for p in prompts])


def _mean(design: Column, coefficients: Column, weights: Column) -> float:
    return float(np.average(_logistic(design @ coefficients), weights=weights))


def _logistic(x: Column) -> Column:
    return np.exp(-np.logaddexp(0.0, -x))


def _log_loss(truth: Column, preferences: Column, weights: Column) -> float:
    inside = np.clip(preferences, 1e-15, 1 - 1e-15)
    return -float(np.average(truth * np.log(inside) + (1 - truth) * np.log(1 - inside), weights=weights))
