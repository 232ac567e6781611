"""Two-factor effects: by how much the effect of one setting depends on the value of another.

Where trials cross two values of each setting, all else equal, the effect is the difference of differences over the
held-out pairs, (a2 b2 - a1 b2) - (a2 b1 - a1 b1), averaged over such groups of four; all of them are one family of
simultaneous intervals. Values drawn from ranges never cross: there the effect is that of a linear model of the trials'
objectives (settings, their squares and the products), between the corners of the tried ranges, with t intervals over
trials and Bonferroni's correction.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dashboards.analysis.param_effects import MAX_COMPARED, SEED, is_log, is_numeric_setting, levels, matched_groups
from dashboards.analysis.significance import compared_trials
from dashboards.analysis.sweep_frame import SweepFrame
from dashboards.formatting import format_value

Column = NDArray[np.float64]

GAMMAS = ("loss.gamma", "loss.gamma_beta_ratio")
_LEARNING_RATE = "training.learning_rate"
_FREEDOM = 8
"""Trials beyond the terms of the linear model that it needs at least."""


@dataclass(frozen=True, slots=True)
class Interaction:
    """The largest two-factor effect of two settings: how much more the first one's step changes the objective."""

    first: str
    second: str
    """Dotted paths."""
    steps: tuple[tuple[Any, Any], tuple[Any, Any]] | None
    """The two values of each setting."""
    mean: float = 0.0
    low: float = 0.0
    high: float = 0.0
    comparisons: int = 0
    fitted: bool = False
    """Whether it comes from the linear model."""
    reason: str = ""
    """Why there is no effect to show; "" where there is one."""

    @property
    def is_clear(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low > 0 or self.high < 0

    def as_json(self) -> dict[str, Any]:
        """Return it as `report --json` has it; `steps` and `effect` are None where it is unknown, `reason` says why."""
        known = {"mean": self.mean, "low": self.low, "high": self.high, "comparisons": self.comparisons}
        return {
            "settings": [self.first, self.second],
            "steps": self.steps,
            "effect": None if self.steps is None else known | {"fitted": self.fitted, "clear": self.is_clear},
            "reason": self.reason,
        }


def interacting_paths(frame: SweepFrame, importances: Sequence[str]) -> tuple[str, ...]:
    """Return at most three settings to look at: beta, gamma and learning rate, then by importance, largest first."""
    varied = [path for path in frame.paths if path != SEED and len(levels(frame, path)) > 1]
    gammas = [path for path in GAMMAS if path in varied]
    first = [path for path in ("loss.beta", *gammas[:1], _LEARNING_RATE) if path in varied]
    rest = sorted(varied, key=lambda path: importances.index(path) if path in importances else len(importances))
    return tuple(dict.fromkeys([*first, *rest]))[:3]


def interactions(frame: SweepFrame, paths: Sequence[str]) -> list[Interaction]:
    """Return the largest two-factor effect of each pair of these settings, or why it is unknown."""
    pairs = list(combinations(paths, 2))
    crossed = _crossed(frame, pairs)
    fitted = _fitted(frame, paths, [pair for pair in pairs if pair not in crossed])
    return [crossed[pair] if pair in crossed else fitted[pair] for pair in pairs]


def _crossed(frame: SweepFrame, pairs: Sequence[tuple[str, str]]) -> dict[tuple[str, str], Interaction]:
    """Return the effects of the pairs of settings whose values trials cross."""
    compared = compared_trials(frame)
    if compared is None:
        return {}
    keys: list[tuple[tuple[str, str], tuple[tuple[Any, Any], tuple[Any, Any]]]] = []
    weights: list[Column] = []
    for first, second in pairs:
        groups = matched_groups(frame, (first, second))
        of_first, of_second = ([level.value for level in levels(frame, path)] for path in (first, second))
        if max(len(of_first), len(of_second)) > MAX_COMPARED:
            continue
        for (a1, a2), (b1, b2) in ((a, b) for a in combinations(of_first, 2) for b in combinations(of_second, 2)):
            cells = (((a2, b2), 1.0), ((a1, b2), -1.0), ((a2, b1), -1.0), ((a1, b1), 1.0))
            corners = [((repr(a), repr(b)), sign) for (a, b), sign in cells]
            full = [group for group in groups if all(corner in group for corner, _ in corners)]
            if full:
                weight = np.zeros(len(compared.trials))
                for group in full:
                    for corner, sign in corners:
                        weight[group[corner]] += sign / len(full)
                keys.append(((first, second), ((a1, a2), (b1, b2))))
                weights.append(weight)
    if not weights:
        return {}
    out: dict[tuple[str, str], Interaction] = {}
    for (pair, steps), found in zip(keys, compared.columns.contrasts(np.stack(weights, axis=1)), strict=True):
        made = Interaction(*pair, steps, found.mean, found.joint_low, found.joint_high, found.comparisons)
        best = out.get(pair)
        if best is None or (made.is_clear, abs(made.mean)) > (best.is_clear, abs(best.mean)):
            out[pair] = made
    return out


def _fitted(
    frame: SweepFrame, paths: Sequence[str], pairs: Sequence[tuple[str, str]]
) -> dict[tuple[str, str], Interaction]:
    """Return the effects of these pairs in the linear model, or why there are none."""
    trials = [
        trial
        for trial in frame.comparable_trials
        if trial.record.value is not None and all(path in trial.record.params for path in paths)
    ]
    terms = 1 + 2 * len(paths) + len(pairs)
    needed = terms + _FREEDOM
    numeric = all(is_numeric_setting(frame, path) for path in paths)
    if not numeric or len(trials) < needed:
        reason = "no four complete trials with common held-out pairs cross two values of each, all else equal" + (
            f", and a linear model needs {needed} complete trials (there are {len(trials)})" if numeric else ""
        )
        return {pair: Interaction(*pair, None, reason=f"too few trials: {reason}") for pair in pairs}
    ends = {path: _ends([float(t.record.params[path]) for t in trials]) for path in paths}
    scaled = {
        path: np.array([_scaled(float(t.record.params[path]), ends[path], is_log(frame, path)) for t in trials])
        for path in paths
    }
    columns = [np.ones(len(trials)), *scaled.values(), *(x * x for x in scaled.values())]
    columns += [scaled[a] * scaled[b] for a, b in pairs]
    design = np.stack(columns, axis=1)
    if np.linalg.matrix_rank(design) < design.shape[1]:
        reason = "unknown: these settings were only varied together, or have two values each"
        return {pair: Interaction(*pair, None, reason=reason) for pair in pairs}
    return _effects(design, np.array([t.record.value for t in trials], dtype=np.float64), pairs, ends)


def _effects(
    design: Column, values: Column, pairs: Sequence[tuple[str, str]], ends: dict[str, tuple[float, float]]
) -> dict[tuple[str, str], Interaction]:
    from scipy.special import stdtrit

    coefficients = np.linalg.lstsq(design, values, rcond=None)[0]
    freedom = len(values) - design.shape[1]
    variance = float(np.sum((values - design @ coefficients) ** 2)) / freedom
    errors = np.sqrt(np.diag(np.linalg.inv(design.T @ design)) * variance)
    half = float(stdtrit(freedom, 1 - 0.025 / len(pairs)))
    out: dict[tuple[str, str], Interaction] = {}
    for k, pair in enumerate(pairs, design.shape[1] - len(pairs)):
        mean, error = 4 * float(coefficients[k]), 4 * float(errors[k])  # settings run from -1 to 1
        steps = (ends[pair[0]], ends[pair[1]])
        out[pair] = Interaction(*pair, steps, mean, mean - half * error, mean + half * error, len(pairs), fitted=True)
    return out


def _ends(values: Sequence[float]) -> tuple[float, float]:
    return min(values), max(values)


def _scaled(value: float, ends: tuple[float, float], log: bool) -> float:
    """Return the value's place between the ends, from -1 to 1, on the setting's scale."""
    low, high = ends
    if low == high:
        return 0.0
    share = math.log(value / low) / math.log(high / low) if log else (value - low) / (high - low)
    return 2 * share - 1


def describe(frame: SweepFrame, found: Interaction) -> str:
    """Return the two steps of an effect, such as `beta 2 → 10, at rate 3e-7 against 1e-6`."""
    if found.steps is None:
        return found.reason
    first, second = (frame.short_names.get(path, path) for path in (found.first, found.second))
    (a1, a2), (b1, b2) = (tuple(map(format_value, step)) for step in found.steps)
    return f"{first} {a1} → {a2}, at {second} {b2} against {b1}"
