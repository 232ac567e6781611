"""Wilcoxon: the trial against the best one it may know, held-out pair by held-out pair, at the same update.

Optuna's pruner of this name with the held-out pairs as problem instances: every trial sees the same pairs, so that a
difference far below the noise between pairs shows. Compared are the gaps of length-averaged log-probs, which neither
beta nor gamma scales.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from orchestrator.spec.goal import Goal
from orchestrator.spec.pruners import WilcoxonPruner
from orchestrator.study.knowing import Known
from orchestrator.study.pruning.course import Course, at_update
from orchestrator.study.state import TrialState


def best_known(others: Iterable[Known], goal: Goal) -> Known | None:
    """The complete trial with the best value of the sweep's first goal."""
    sign = -1.0 if goal.direction == "maximize" else 1.0
    done = [
        (sign * t.values[0], t.number, t)
        for t in others
        if t.state is TrialState.COMPLETE and t.values is not None and math.isfinite(t.values[0])
    ]
    return min(done, key=lambda row: row[:2])[2] if done else None


def wilcoxon(config: WilcoxonPruner, own: Course, mine: Sequence[float], best: int, theirs: Sequence[float]) -> str:
    """Why the trial stops; empty: it goes on. `mine` and `theirs` are the gaps of the same pairs at the same update."""
    from scipy.stats import wilcoxon as signed_rank

    warmup = at_update(config.n_warmup_steps, own.updates)
    if warmup is None or own.step < warmup or len(mine) != len(theirs) or not mine:
        return ""
    if any(math.isnan(value) for value in mine):
        return own.reason(f"{own.goal.metric} is not a number")
    differences = [a - b for a, b in zip(mine, theirs, strict=True)]
    if not any(differences) or sum(differences) >= 0:
        return ""
    tested: Any = signed_rank(differences, alternative="less", zero_method="zsplit")
    p = float(tested.pvalue)
    if p >= config.p_threshold:
        return ""
    lower = sum(d < 0 for d in differences)
    return own.reason(
        f"worse than trial {best} pair by pair: a smaller gap of log-probs on {lower} of {len(differences)} held-out "
        f"pairs (signed-rank test, p = {p:.2g} below {config.p_threshold:g})"
    )
