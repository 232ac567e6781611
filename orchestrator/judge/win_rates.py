"""Win rate, its Wilson interval, position bias and length-controlled win rate of a judge's preferences.

Length-controlled win rate (AlpacaEval 2): the win rate to be expected if both answers had the same length.

Source: Dubois, Galambosi, Liang, Hashimoto, "Length-Controlled AlpacaEval", 2024, and `length_controlled_v1` in
alpaca_eval's `metrics/glm_winrate.py`. As there: a logistic regression without intercept of the preference (0 to 1) on

- the model's term, 1 in every row;
- tanh of the difference in characters of the two answers, divided by its standard deviation (of the sample, n - 1);
- the prompt's difficulty, where it is known;

with an L1 penalty whose strength (ten values, 1e-4 to 1e4) is the best by log loss in five folds of prompts, fitted by
liblinear. The rate is the mean prediction over the prompts with the length term set to 0.

What differs, because AlpacaEval's own files are about its 805 prompts and one baseline: difficulty is not looked up but
estimated from how the *other* judged trials fare on the prompt, smoothed log-odds, and only where there are at least
three of them; and no rows of the baseline told to be verbose or concise are added (weight 0.2 there). The interval is
our own: the fit, at the strength found, over draws of the prompts with replacement. Where that strength removes the
model's term, as it does with few prompts, the rate would be one half for any data: rate and interval are then those of
the weakest penalty. Several samples of a prompt together have the weight of one.
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
class VotePair:
    """The votes on one pair: with the trial's answer shown first, and with it second. None: no judgement."""

    trial_first: Vote | None
    trial_second: Vote | None

    @property
    def preference(self) -> float | None:
        """How far the trial's answer is preferred, the mean of both orders; None unless both have a judgement."""
        if self.trial_first is None or self.trial_second is None:
            return None
        given = {"first": 1.0, "tie": 0.5, "second": 0.0}
        return (given[self.trial_first] + 1.0 - given[self.trial_second]) / 2

    @property
    def for_first(self) -> float | None:
        """The share of the decided votes that went to the answer shown first; None where neither is decided."""
        decided = [vote == "first" for vote in (self.trial_first, self.trial_second) if vote in ("first", "second")]
        return sum(decided) / len(decided) if decided else None

    @property
    def is_consistent(self) -> bool | None:
        """Whether both orders prefer the same answer; None unless both have a judgement."""
        preference = self.preference
        return (
            None if preference is None else preference in (0.0, 1.0) or self.trial_first == self.trial_second == "tie"
        )


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


def first_position(votes: Sequence[tuple[str, VotePair]]) -> tuple[Rate | None, float | None]:
    """The share of decided votes for the answer shown first (one half is no bias), and the share of pairs of which both
    orders say the same; None where there is none.

    `votes`: prompt and both orders' votes on one pair, which are one observation; each prompt weighs alike.
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
"""Judged trials beside the one in question, for the prompts' difficulty."""
_SEED = 0
_TAIL = 2.5
_MIN_PROBABILITY = 1e-6
"""Preferences of 0 and 1 are this far inside: a class without any weight cannot be fitted."""


def length_controlled(
    preferences: Column,
    trial_lengths: Column,
    initial_lengths: Column,
    prompts: Sequence[str],
    difficulty: Column | None = None,
) -> Rate | None:
    """The length-controlled win rate, see above; None with fewer prompts than folds.

    All arguments are of the same pairs of answers: `trial_lengths` and `initial_lengths` their characters, `prompts`
    the prompt of each.
    """
    positions = {prompt: position for position, prompt in enumerate(dict.fromkeys(prompts))}
    groups, count = np.array([positions[prompt] for prompt in prompts], dtype=np.int64), len(positions)
    if count < FOLDS:
        return None
    each = (1 / np.bincount(groups))[groups]  # a prompt's samples weigh 1 together
    margins = initial_lengths - trial_lengths
    middle = float(np.average(margins, weights=each))
    spread = float(np.sqrt(np.sum(each * (margins - middle) ** 2) / (count - 1)))
    length = np.tanh(margins / spread) if spread > 0 else np.zeros_like(margins)
    terms = [length, np.ones_like(margins)] + ([] if difficulty is None else [difficulty])
    design = np.stack(terms, axis=1)
    level = design.copy()
    level[:, 0] = 0.0
    strength = best_strength(design, preferences, each, groups)
    fitted = fit_logistic(design, preferences, each, strength)
    if fitted[1] == 0:  # shrunk to nothing: one half, whatever the data say
        strength = STRENGTHS[-1]
        fitted = fit_logistic(design, preferences, each, strength)
    value = _mean(level, fitted, each)
    rng = np.random.default_rng(_SEED)
    sampled: list[float] = []
    for _ in range(RESAMPLES):
        weights = each * rng.multinomial(count, np.full(count, 1 / count))[groups]
        sampled.append(_mean(level, fit_logistic(design, preferences, weights, strength), weights))
    low, high = (float(end) for end in np.percentile(sampled, [_TAIL, 100 - _TAIL]))
    return Rate(value=value, low=min(low, value), high=max(high, value))


def best_strength(design: Column, preferences: Column, weights: Column, groups: NDArray[Any]) -> float:
    """The penalty's inverse with the least log loss on prompts that were not fitted."""
    from sklearn.model_selection import GroupKFold

    def held_out_loss(rest: NDArray[Any], stored: NDArray[Any], strength: float) -> float:
        fitted = fit_logistic(design[rest], preferences[rest], weights[rest], strength)
        return _log_loss(preferences[stored], _logistic(design[stored] @ fitted), weights[stored])

    folds = list(GroupKFold(n_splits=FOLDS).split(design, groups=groups))
    losses = [np.mean([held_out_loss(rest, stored, strength) for rest, stored in folds]) for strength in STRENGTHS]
    return STRENGTHS[int(np.argmin(losses))]


def fit_logistic(design: Column, preferences: Column, weights: Column, strength: float) -> Column:
    """Coefficients. A preference of 0.7 is a row that won with weight 0.7 and one that lost with 0.3."""
    from sklearn import config_context
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    inside = np.clip(preferences, _MIN_PROBABILITY, 1 - _MIN_PROBABILITY)
    model = LogisticRegression(
        l1_ratio=1.0, C=strength, solver="liblinear", fit_intercept=False, tol=1e-6, max_iter=1000, random_state=123
    )
    rows, won = np.concatenate([design, design]), np.repeat([1, 0], len(design))
    with warnings.catch_warnings(), config_context(assume_finite=True, skip_parameter_validation=True):
        # Where one term tells wins from losses, the weakest penalties let it grow on and on: a rate of 1 all the same.
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(rows, won, sample_weight=np.concatenate([inside * weights, (1 - inside) * weights]))
    return np.asarray(model.coef_[0], dtype=np.float64)


def prompt_difficulty(others: Sequence[Sequence[tuple[str, float]]], prompts: Sequence[str]) -> Column | None:
    """How trials other than the one in question fare on each prompt, as log-odds with one win and one loss added; None
    where there are too few of them. `others`: of each, prompts with preferences.
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


def _mean(level: Column, coefficients: Column, weights: Column) -> float:
    return float(np.average(_logistic(level @ coefficients), weights=weights))


def _logistic(x: Column) -> Column:
    return np.exp(-np.logaddexp(0.0, -x))


def _log_loss(truth: Column, preferences: Column, weights: Column) -> float:
    inside = np.clip(preferences, 1e-15, 1 - 1e-15)
    return -float(np.average(truth * np.log(inside) + (1 - truth) * np.log(1 - inside), weights=weights))
