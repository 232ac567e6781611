"""Leaves that were varied together only: which of them mattered, no comparison of these trials can tell."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from typing import Any

import numpy as np

from dashboards.diagnosis.finding import Finding, Level
from dashboards.effects import is_numeric
from dashboards.frame import show
from dashboards.pairs import spearman
from dashboards.seeds import SEED
from dashboards.sweep_frame import SweepFrame, TrialCase
from orchestrator.spec.space import IntUniform, LogUniform, Uniform

_FEWEST = 3
_FEWEST_RANKED = 5
"""Trials. Ranks of fewer are in order by chance in more than 5 of 100 cases (2 / 4! = 8 %)."""
ALIKE = 0.95
"""From this rank correlation on, two leaves are as good as one."""


def varied_together(frame: SweepFrame) -> Iterator[Finding]:
    """Pairs of leaves of which each value of one came with one value of the other, or nearly so."""
    for a, b in combinations([p for p in frame.paths if p != SEED], 2):
        cases = [c for c in frame.whole if a in c.record.params and b in c.record.params]
        ones, others = _values(cases, a), _values(cases, b)
        if len(cases) < _FEWEST or len(ones) < 2 or len(others) < 2:
            continue
        how = _how_close(frame, cases, a, b)
        if not how:
            continue
        first, second = frame.short.get(a, a), frame.short.get(b, b)
        mine = cases[0].record.params
        another = next(value for key, value in others.items() if key != repr(mine[b]))
        yield Finding(
            "varied_together",
            Level.WARNING,
            f"{first} and {second} were only varied together",
            f"Over {len(cases)} complete trials {how}: whichever of the two mattered, the other moved with it.",
            f"Add trials that change one alone, for example {first} {show(mine[a])} with {second} {show(another)}.",
            tuple(c.label for c in cases),
            b,
        )


def _values(cases: list[TrialCase], path: str) -> dict[str, Any]:
    return {repr(c.record.params[path]): c.record.params[path] for c in cases}


def _how_close(frame: SweepFrame, cases: list[TrialCase], a: str, b: str) -> str:
    """In words; empty where each was varied beside the other. Of a range each value is drawn once: ranks tell there."""
    pairs = {(repr(c.record.params[a]), repr(c.record.params[b])) for c in cases}
    drawn = any(isinstance(frame.space.dimensions.get(p), (Uniform, LogUniform, IntUniform)) for p in (a, b))
    if not drawn and len(pairs) == len(_values(cases, a)) == len(_values(cases, b)):
        return "each value of one came with one value of the other"
    if len(cases) >= _FEWEST_RANKED and is_numeric(frame, a) and is_numeric(frame, b):
        rho = spearman(*(np.array([float(c.record.params[p]) for c in cases]) for p in (a, b)))
        if rho is not None and abs(rho) >= ALIKE:
            return f"their rank correlation is {rho:+.2f}"
    return ""
