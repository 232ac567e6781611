"""Simulated learning curves: held-out accuracy during training, by learning rate, beta and gamma.

The shapes follow OBJECTIVES.md: accuracy rises fast and flattens; the learning rate matters most, the margin little; a
rate ten times too large diverges or collapses late; small rates start slowly and still rise at the end; evaluations are
noisy (500 pairs: a standard error of 0.02, most of it shared by trials because the pairs are shared).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from benchmarks.simulation import Curve
from trainer.results import pack_floats

UPDATES, EVALUATIONS, PAIRS = 400, 10, 200
SEARCH = {
    "training.learning_rate": {"log_uniform": [1e-7, 1e-5]},
    "loss.beta": {"uniform": [1.0, 10.0]},
    "loss.gamma_beta_ratio": {"uniform": [0.0, 1.0]},
}
Times = Literal["equal", "varied", "heavy-tailed"]


@dataclass(frozen=True, slots=True)
class CurveSimulator:
    """Generates the curves of trials; the same number and settings always give the same curve."""

    seed: int
    times: Times = "varied"
    noise: float = 0.006

    def __call__(self, number: int, params: Mapping[str, Any]) -> Curve:
        """Return the curve of a trial."""
        random = np.random.default_rng([self.seed, number])
        shared = np.random.default_rng([self.seed])
        rate_best, beta_best, ratio_best = (
            10 ** shared.uniform(-6.4, -5.8),
            shared.uniform(2, 10),
            shared.uniform(0.2, 0.8),
        )
        rate = math.log10(params["training.learning_rate"] / rate_best)
        beta = math.log(params["loss.beta"] / beta_best)
        ratio = params["loss.gamma_beta_ratio"] - ratio_best
        final = 0.74 - 0.12 * rate**2 - 0.012 * beta**2 - 0.03 * ratio**2 + random.normal(0, 0.004)
        pace = 0.16 * 10 ** (-0.45 * rate) * math.exp(random.normal(0, 0.15))
        diverges = random.uniform() < 1 / (1 + math.exp(-9 * (rate - 0.75)))
        end = random.uniform(0.1, 0.7) if diverges else math.inf
        hardness = shared.normal(0, 1, PAIRS)
        values: dict[int, float] = {}
        margins: dict[int, float] = {}
        for k in range(1, EVALUATIONS + 1):
            share = k / EVALUATIONS
            risen = 1 - math.exp(-share / max(pace, 1e-3))
            value = 0.55 + (max(final, 0.5) - 0.55) * risen + random.normal(0, self.noise)
            margins[round(share * UPDATES)] = 10 * (0.55 + (max(final, 0.5) - 0.55) * risen - 0.55)
            values[round(share * UPDATES)] = math.nan if share >= end else float(np.clip(value, 0, 1))

        def pairs(step: int) -> str:
            chance = np.random.default_rng([self.seed, number, step])
            return pack_floats(margins[step] + hardness + chance.normal(0, 0.5, PAIRS))

        return Curve(values, UPDATES, self._seconds(random), pairs)

    def _seconds(self, random: np.random.Generator) -> float:
        match self.times:
            case "equal":
                return 1.0
            case "varied":
                return float(random.uniform(0.8, 1.25))
            case "heavy-tailed":
                return float(0.6 + random.pareto(2.5))
