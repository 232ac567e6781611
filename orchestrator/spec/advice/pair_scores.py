"""`PairScores`: log-probs of preference pairs under the initial model, and what follows from them by formula.

Symbols: lp summed log-prob of a response, n its tokens; w chosen, l rejected. The gap of a pair is lp_w / n_w - lp_l /
n_l, in nats per token. A logistic loss of beta * (gap - ratio) has the gradient -beta * w on the gap, where
w = sigmoid(beta * (ratio - gap)) is the pair's weight, between 0 and 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.float64]
_PERCENTILES = (5, 25, 50, 75, 95)
_LEFT_WEIGHT = 0.1
"""Weight at which a pair counts as learned, where a distance is asked for."""
TRAVEL = math.log(1 / _LEFT_WEIGHT - 1)
"""ln 9: how far beta times a margin moves while the pair's weight falls from 1/2 to 1/10."""


@dataclass(frozen=True, slots=True)
class Distribution:
    """Mean, standard deviation and percentiles (`p5`...) of one number per pair."""

    mean: float
    sd: float
    percentiles: Mapping[str, float]

    @classmethod
    def of(cls, values: Values) -> Distribution:
        """Return the distribution of at least one value."""
        found = np.percentile(values, _PERCENTILES)
        return cls(
            float(values.mean()),
            float(values.std()),
            {f"p{q}": float(value) for q, value in zip(_PERCENTILES, found, strict=True)},
        )

    @property
    def median(self) -> float:
        """The 50th percentile."""
        return self.percentiles["p50"]


@dataclass(frozen=True, slots=True)
class MarginEffect:
    """What a target margin does at the start of training, with one value of beta.

    `beyond`: share of the pairs whose gap exceeds the margin already; `weight`: mean weight of the pairs; `effective`:
    share of the pairs that carry the gradient, (sum w)^2 / (N sum w^2) (Kish).
    """

    beta: float
    ratio: float
    beyond: float
    weight: float
    effective: float


@dataclass(frozen=True, slots=True)
class LengthBias:
    """Lengths of chosen and rejected responses in tokens.

    `longer`, `shorter`: shares of the pairs whose chosen response is the longer, the shorter one; `correlation`: of the
    logarithm of a response's length with being chosen, over all responses; `gap_correlation`: of the pairs' difference
    in length with their gap.
    """

    chosen: float
    rejected: float
    longer: float
    shorter: float
    correlation: float
    gap_correlation: float


@dataclass(frozen=True, slots=True)
class Repetition:
    """Shares of near-duplicates: see `orchestrator/commands/advice/near_duplicates.py`.

    `prompts`: of the training prompts, those with an earlier near-duplicate; `held_out`: of the held-out prompts, those
    with a near-duplicate among the training prompts; `answers`: of the pairs, those with two nearly equal responses.
    """

    prompts: float
    held_out: float
    answers: float
    compared_prompts: int
    """Training prompts that were compared."""


@dataclass(frozen=True, slots=True)
class PairScores:
    """Scored pairs of one split. Arrays of shape [N], N at least 1: log-probs summed over tokens, counts of tokens.

    A row with one response and a label (KTO) has 0 tokens on the other side; gaps, sums and `right` are of pairs only.
    """

    split: str
    pairs_in_split: int
    chosen: Values
    rejected: Values
    chosen_tokens: Values
    rejected_tokens: Values
    train_pairs: int
    repetition: Repetition
    initial_model: str = ""
    """What was scored, in words."""
    seconds: float = field(default=0.0, compare=False)

    @property
    def labels(self) -> tuple[int, int]:
        """Desirable and undesirable responses that were scored: of pairs as many of both."""
        return int((self.chosen_tokens > 0).sum()), int((self.rejected_tokens > 0).sum())

    @property
    def paired(self) -> bool:
        """Whether every row has both responses."""
        return sum(self.labels) == 2 * len(self.chosen)

    @property
    def gaps(self) -> Values:
        """The gaps in nats per token."""
        return self.chosen / self.chosen_tokens - self.rejected / self.rejected_tokens

    @property
    def sums(self) -> Values:
        """The differences of summed log-probs, in nats."""
        return self.chosen - self.rejected

    @property
    def mean_tokens(self) -> float:
        """Mean length of a response."""
        return float((self.chosen_tokens.sum() + self.rejected_tokens.sum()) / sum(self.labels))

    @property
    def is_sample(self) -> bool:
        """Whether only a part of the split was scored."""
        return len(self.chosen) < self.pairs_in_split

    @property
    def right(self) -> float:
        """Share of the pairs whose chosen response is the likelier one per token; ties count as wrong."""
        return float((self.gaps > 0).mean())

    def as_json(self) -> dict[str, Any]:
        """Return the values that `from_json` reads."""
        columns = {name: getattr(self, name).tolist() for name in _COLUMNS}
        kept = ("split", "pairs_in_split", "train_pairs", "initial_model", "seconds")
        return columns | {name: getattr(self, name) for name in kept} | {"repetition": asdict(self.repetition)}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> PairScores:
        """Return the inverse of `as_json`. Raises KeyError, TypeError or ValueError if the values are others."""
        columns = {name: np.asarray(stored[name], dtype=np.float64) for name in _COLUMNS}
        if len({len(column) for column in columns.values()}) != 1 or not len(columns["chosen"]):
            raise ValueError("the columns differ in length or are empty")
        return cls(
            split=str(stored["split"]),
            pairs_in_split=int(stored["pairs_in_split"]),
            train_pairs=int(stored["train_pairs"]),
            repetition=Repetition(**stored["repetition"]),
            initial_model=str(stored["initial_model"]),
            seconds=float(stored["seconds"]),
            **columns,
        )


_COLUMNS = ("chosen", "rejected", "chosen_tokens", "rejected_tokens")


def weights(beta: float, values: Values, ratio: float = 0.0) -> Values:
    """Return sigmoid(beta * (ratio - value)) of each value: the pair's weight in the gradient."""
    z = beta * (ratio - values)
    small = np.exp(-np.abs(z))  # exp of a large number would overflow
    return np.where(z >= 0, 1.0, small) / (1.0 + small)


def margin_effect(beta: float, ratio: float, values: Values) -> MarginEffect:
    """Return what the margin `ratio` does with this beta; `values` are gaps, or sums for a loss on sums (ratio 0)."""
    found = weights(beta, values, ratio)
    squares = float((found**2).sum())
    effective = float(found.sum()) ** 2 / (len(found) * squares) if squares > 0 else 0.0
    return MarginEffect(beta, ratio, float((values > ratio).mean()), float(found.mean()), effective)


def log_odds(scores: PairScores) -> Values:
    """Return ORPO's log odds ratio of each pair, from length-averaged log-probs (arXiv 2403.07691, eq. 7)."""
    chosen, rejected = scores.chosen / scores.chosen_tokens, scores.rejected / scores.rejected_tokens
    limit = -1e-12  # as in the objective: log(1 - p) needs p below 1

    def log_complement(value: Values) -> Values:
        return np.log1p(-np.exp(np.minimum(value, limit)))

    return (chosen - rejected) - (log_complement(chosen) - log_complement(rejected))


def length_bias(scores: PairScores) -> LengthBias:
    """Return how far the lengths of the responses give their labels away."""
    chosen, rejected = scores.chosen_tokens, scores.rejected_tokens
    lengths = np.log(np.concatenate([chosen, rejected]))
    labels = np.concatenate([np.ones(len(chosen)), np.zeros(len(rejected))])
    return LengthBias(
        chosen=float(chosen.mean()),
        rejected=float(rejected.mean()),
        longer=float((chosen > rejected).mean()),
        shorter=float((chosen < rejected).mean()),
        correlation=correlation(lengths, labels),
        gap_correlation=correlation(chosen - rejected, scores.gaps),
    )


def correlation(left: Values, right: Values) -> float:
    """Return Pearson's correlation; 0 where one of the two does not vary."""
    a, b = left - left.mean(), right - right.mean()
    scale = math.sqrt(float((a**2).sum()) * float((b**2).sum()))
    return float((a * b).sum()) / scale if scale > 0 else 0.0


def share_interval(share: float, count: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a share among `count` pairs."""
    z = 1.959964
    center = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, center - half), min(1.0, center + half)


def rounded(values: Sequence[float]) -> tuple[float, ...]:
    """Return the values, ascending and each once, with one digit where that changes them by at most 15 %, else two."""
    found: list[float] = []
    for value in sorted(values):
        one = float(f"{value:.1g}")
        short = one if abs(one - value) <= 0.15 * abs(value) else float(f"{value:.2g}")
        if short not in found:
            found.append(short)
    return tuple(found)
