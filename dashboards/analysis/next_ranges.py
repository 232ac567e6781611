"""What to search next along one leaf: beyond an edge, finer around the best, or not at all."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from dashboards.analysis.param_effects import (
    Edge,
    between,
    compared,
    diverged_from,
    edge,
    is_numeric,
    known_values,
    levels,
    mostly_diverged_from,
    tidy,
    told_apart,
)
from dashboards.analysis.significance import Difference, case_values, paired_difference
from dashboards.analysis.sweep_frame import SweepFrame, TrialCase, brief, show
from orchestrator.spec.search.space import Choice, Dimension, IntUniform, LogUniform, Uniform

_BEST_SHARE = 0.3
_FEWEST = 3


@dataclass(frozen=True, slots=True)
class Next:
    """How a leaf is searched next, and why; no dimension: it stays at the winner's value."""

    dimension: Dimension | None
    why: str


def next_values(frame: SweepFrame, path: str) -> Next:
    """What to do with a leaf that the winner has."""
    dimension = frame.space.dimensions.get(path)
    if isinstance(dimension, (Uniform, LogUniform, IntUniform)):
        return _range(frame, path, dimension)
    if not is_numeric(frame, path):
        return _named(frame, path)
    at_edge = edge(frame, path)
    apart = told_apart(frame, path)
    if apart is False:
        return Next(None, _flat(frame, path))
    if at_edge is not None and at_edge.beyond:
        return _beyond(frame, path, at_edge)
    return _finer(frame, path)


def _flat(frame: SweepFrame, path: str) -> str:
    values = [level.value for level in levels(frame, path)]
    found = [c for k, a in enumerate(values) for b in values[k + 1 :] if (c := compared(frame, path, a, b))]
    widest = max((difference for difference, _ in found), key=lambda d: abs(d.mean))
    return (
        f"its values could not be told apart (at most {brief(abs(widest.mean))} between them, 95 % interval "
        f"{brief(widest.low)} to {brief(widest.high)})"
    )


def _beyond(frame: SweepFrame, path: str, found: Edge) -> Next:
    often = None if found.low_end else mostly_diverged_from(frame, path)
    if often is not None and often <= found.at:
        return replace(_finer(frame, path), why=f"not beyond {show(found.at)}: {_half(often)}")
    limit = diverged_from(frame, path)
    beyond = [v for v in found.beyond if limit is None or v < limit]
    where = "lowest" if found.low_end else "highest"
    if not beyond:
        assert limit is not None
        values = [found.at, between(frame, path, found.at, limit)]
        return Next(_choice(frame, path, values), f"{show(found.at)} won, and from {show(limit)} on all diverged")
    values = sorted([found.at, *beyond])
    best = {level.value: level.best for level in levels(frame, path)}
    told = "" if found.inner not in best else f" (best {brief(best[found.at])}, next to it {brief(best[found.inner])})"
    return Next(_choice(frame, path, values), f"the best was the {where} tried{told}, so the optimum may lie beyond")


def _half(often: float) -> str:
    return f"from {show(often)} on at least half of the trials diverged"


def _finer(frame: SweepFrame, path: str) -> Next:
    at = float(frame.ranked[0].record.params[path])
    tested = known_values(frame, path)
    below, above = [v for v in tested if v < at], [v for v in tested if v > at]
    values = [
        *([between(frame, path, below[-1], at)] if below else []),
        at,
        *([between(frame, path, at, above[0])] if above else []),
    ]
    distinct = list(dict.fromkeys(values))
    if len(distinct) < 2:
        return Next(None, "only one value was tried")
    return Next(_choice(frame, path, distinct), f"half-way to the neighbours of the best, {show(at)}")


def _choice(frame: SweepFrame, path: str, values: list[float]) -> Choice:
    whole = all(isinstance(case.record.params[path], int) for case in frame.trials if path in case.record.params)
    kept: list[Any] = [round(v) if whole else v for v in values]
    return Choice(choice=tuple(dict.fromkeys(kept)))


def _named(frame: SweepFrame, path: str) -> Next:
    """Names: those that are not clearly worse than the winner's stay."""
    winner = frame.ranked[0].record.params[path]
    kept, dropped = [winner], list[str]()
    for level in levels(frame, path):
        if repr(level.value) == repr(winner):
            continue
        found = compared(frame, path, winner, level.value)
        difference = found[0] if found is not None else _best_against(frame, level.cases[0])
        if difference is not None and difference.clear:
            dropped.append(f"{show(level.value)} (behind by {brief(abs(difference.mean))})")
        else:
            kept.append(level.value)
    worse = f"clearly worse: {', '.join(dropped)}" if dropped else ""
    if len(kept) == 1:
        return Next(None, worse or "only one value completed")
    return Next(Choice(choice=tuple(kept)), "not told apart yet" + (f"; left out as {worse}" if worse else ""))


def _best_against(frame: SweepFrame, other: TrialCase) -> Difference | None:
    """The winner against the best trial with another value: for leaves that change which others there are."""
    best = frame.ranked[0]
    ours, theirs = case_values(frame, best), case_values(frame, other)
    if ours is None or theirs is None or best.pairs is None or other.pairs is None:
        return None
    return paired_difference(ours, theirs, frame.goal.metric) if best.pairs.same_pairs(other.pairs) else None


def _range(frame: SweepFrame, path: str, dimension: Uniform | LogUniform | IntUniform) -> Next:
    """Around the best trials; further out where the best lies at an end."""
    ranked = [case for case in frame.ranked if path in case.record.params]
    count = max(_FEWEST, math.ceil(_BEST_SHARE * len(ranked)))
    values = [float(case.record.params[path]) for case in ranked[:count]]
    if len(values) < 2 or min(values) == max(values):
        return Next(dimension, "as before: too few trials to narrow it")
    low, high = min(values), max(values)
    why = f"where the best {len(values)} of {len(ranked)} trials lie"
    found = edge(frame, path)
    often = mostly_diverged_from(frame, path)
    if found is not None and found.beyond and not found.low_end and often is not None and often <= found.at:
        why += f"; not beyond them: {_half(often)}"
    elif found is not None and found.beyond:
        low, high = (min(low, found.beyond[0]), high) if found.low_end else (low, max(high, found.beyond[0]))
        why += f", and beyond the {'lower' if found.low_end else 'upper'} end, where the best one is"
    limit = diverged_from(frame, path)
    if limit is not None and high >= limit:
        high = between(frame, path, max(values), limit)
        why += f"; from {show(limit)} on all diverged"
    match dimension:
        case IntUniform():
            return Next(IntUniform(int_uniform=(math.floor(low), math.ceil(high)), log=dimension.log), why)
        case LogUniform():
            return Next(LogUniform(log_uniform=(tidy(low), _up(high))), why)
        case Uniform():
            return Next(Uniform(uniform=(_down(low), _up(high))), why)


def _up(value: float) -> float:
    rounded = tidy(value)
    return rounded if rounded >= value else tidy(value * 1.1 if value > 0 else value * 0.9)


def _down(value: float) -> float:
    rounded = tidy(value)
    return rounded if rounded <= value else value
