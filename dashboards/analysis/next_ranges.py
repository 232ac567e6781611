"""Next search range of one setting: extended past a boundary optimum, refined around the best value, or fixed."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from dashboards.analysis.param_effects import (
    BoundaryOptimum,
    boundary_optimum,
    diverged_from,
    has_clear_effect,
    is_numeric,
    known_values,
    levels,
    matched_difference,
    midpoint,
    mostly_diverged_from,
    round_value,
)
from dashboards.analysis.significance import Difference, paired_difference, trial_values
from dashboards.analysis.sweep_frame import SweepFrame, TrialFrame
from dashboards.formatting import format_brief, format_value
from orchestrator.spec.search.dimensions import Choice, Dimension, IntUniform, LogUniform, Uniform

_BEST_SHARE = 0.3
"""Share of the ranked trials whose values span the next continuous range."""
_MIN_TRIALS = 3


@dataclass(frozen=True, slots=True)
class NextRange:
    """Next dimension of a setting and the reason; without a dimension it is fixed at the winner's value."""

    dimension: Dimension | None
    reason: str


def next_range(frame: SweepFrame, path: str) -> NextRange:
    """Return the next range of a setting that the winner has."""
    dimension = frame.space.dimensions.get(path)
    if isinstance(dimension, (Uniform, LogUniform, IntUniform)):
        return _continuous_range(frame, path, dimension)
    if not is_numeric(frame, path):
        return _best_choices(frame, path)
    at_edge = boundary_optimum(frame, path)
    if has_clear_effect(frame, path) is False:
        return NextRange(None, _without_effect(frame, path))
    if at_edge is not None and at_edge.extension:
        return _extended_range(frame, path, at_edge)
    return _refined_range(frame, path)


def _without_effect(frame: SweepFrame, path: str) -> str:
    values = [level.value for level in levels(frame, path)]
    found = [c for k, a in enumerate(values) for b in values[k + 1 :] if (c := matched_difference(frame, path, a, b))]
    widest = max((difference for difference, _ in found), key=lambda d: abs(d.mean))
    return (
        f"its values are not distinguishable (at most {format_brief(abs(widest.mean))} between them, 95 % interval "
        f"{format_brief(widest.low)} to {format_brief(widest.high)})"
    )


def _extended_range(frame: SweepFrame, path: str, found: BoundaryOptimum) -> NextRange:
    unstable_from = None if found.is_low_end else mostly_diverged_from(frame, path)
    if unstable_from is not None and unstable_from <= found.value:
        return replace(
            _refined_range(frame, path), reason=f"not above {format_value(found.value)}: {_most_of(unstable_from)}"
        )
    limit = diverged_from(frame, path)
    extension = [v for v in found.extension if limit is None or v < limit]
    where = "lowest" if found.is_low_end else "highest"
    if not extension:
        assert limit is not None
        values = [found.value, midpoint(frame, path, found.value, limit)]
        return NextRange(
            _choice(frame, path, values),
            f"{format_value(found.value)} won, and all trials from {format_value(limit)} upwards diverged",
        )
    values = sorted([found.value, *extension])
    best = {level.value: level.best for level in levels(frame, path)}
    best_text = (
        ""
        if found.inner not in best
        else f" (best {format_brief(best[found.value])}, next to it {format_brief(best[found.inner])})"
    )
    return NextRange(
        _choice(frame, path, values), f"the best value is the {where} tried{best_text}, so the optimum may lie outside"
    )


def _most_of(value: float) -> str:
    return f"from {format_value(value)} upwards at least half of the trials diverged"


def _refined_range(frame: SweepFrame, path: str) -> NextRange:
    best_value = float(frame.ranked[0].record.params[path])
    tested = known_values(frame, path)
    below, above = [v for v in tested if v < best_value], [v for v in tested if v > best_value]
    values = [
        *([midpoint(frame, path, below[-1], best_value)] if below else []),
        best_value,
        *([midpoint(frame, path, best_value, above[0])] if above else []),
    ]
    distinct = list(dict.fromkeys(values))
    if len(distinct) < 2:
        return NextRange(None, "only one value was tried")
    return NextRange(
        _choice(frame, path, distinct), f"halfway to the neighbors of the best value, {format_value(best_value)}"
    )


def _choice(frame: SweepFrame, path: str, values: list[float]) -> Choice:
    is_integer = all(
        isinstance(trial.record.params[path], int) for trial in frame.trials if path in trial.record.params
    )
    choices: list[Any] = [round(v) if is_integer else v for v in values]
    return Choice(choice=tuple(dict.fromkeys(choices)))


def _best_choices(frame: SweepFrame, path: str) -> NextRange:
    """Keep the categorical values that are not clearly worse than the winner's."""
    winner = frame.ranked[0].record.params[path]
    remaining, dropped = [winner], list[str]()
    for level in levels(frame, path):
        if repr(level.value) == repr(winner):
            continue
        found = matched_difference(frame, path, winner, level.value)
        difference = found[0] if found is not None else _best_difference(frame, level.trials[0])
        if difference is not None and difference.is_clear:
            dropped.append(f"{format_value(level.value)} (behind by {format_brief(abs(difference.mean))})")
        else:
            remaining.append(level.value)
    worse = f"clearly worse: {', '.join(dropped)}" if dropped else ""
    if len(remaining) == 1:
        return NextRange(None, worse or "only one value completed")
    return NextRange(
        Choice(choice=tuple(remaining)), "not distinguishable yet" + (f"; left out as {worse}" if worse else "")
    )


def _best_difference(frame: SweepFrame, other: TrialFrame) -> Difference | None:
    """Winner minus the best trial with another value: for settings that change which other settings exist."""
    best = frame.ranked[0]
    winner_values, other_values = trial_values(frame, best), trial_values(frame, other)
    if winner_values is None or other_values is None or best.pairs is None or other.pairs is None:
        return None
    return (
        paired_difference(winner_values, other_values, frame.objective.metric)
        if best.pairs.same_pairs(other.pairs)
        else None
    )


def _continuous_range(frame: SweepFrame, path: str, dimension: Uniform | LogUniform | IntUniform) -> NextRange:
    """Span the best trials' values; extend the range where the best trial lies at an end of it."""
    ranked = [trial for trial in frame.ranked if path in trial.record.params]
    count = max(_MIN_TRIALS, math.ceil(_BEST_SHARE * len(ranked)))
    values = [float(trial.record.params[path]) for trial in ranked[:count]]
    if len(values) < 2 or min(values) == max(values):
        return NextRange(dimension, "unchanged: too few trials to narrow it")
    low, high = min(values), max(values)
    reason = f"range of the best {len(values)} of {len(ranked)} trials"
    found = boundary_optimum(frame, path)
    unstable_from = mostly_diverged_from(frame, path)
    if (
        found is not None
        and found.extension
        and not found.is_low_end
        and unstable_from is not None
        and unstable_from <= found.value
    ):
        reason += f"; not extended: {_most_of(unstable_from)}"
    elif found is not None and found.extension:
        low, high = (min(low, found.extension[0]), high) if found.is_low_end else (low, max(high, found.extension[0]))
        reason += f", extended past the {'lower' if found.is_low_end else 'upper'} end, where the best trial lies"
    limit = diverged_from(frame, path)
    if limit is not None and high >= limit:
        high = midpoint(frame, path, max(values), limit)
        reason += f"; all trials from {format_value(limit)} upwards diverged"
    match dimension:
        case IntUniform():
            return NextRange(IntUniform(int_uniform=(math.floor(low), math.ceil(high)), log=dimension.log), reason)
        case LogUniform():
            return NextRange(LogUniform(log_uniform=(round_value(low), _round_up(high))), reason)
        case Uniform():
            return NextRange(Uniform(uniform=(_round_down(low), _round_up(high))), reason)


def _round_up(value: float) -> float:
    rounded = round_value(value)
    return rounded if rounded >= value else round_value(value * 1.1 if value > 0 else value * 0.9)


def _round_down(value: float) -> float:
    rounded = round_value(value)
    return rounded if rounded <= value else value
