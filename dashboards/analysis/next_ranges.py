"""Next search range of one setting: extended past a boundary optimum, refined around the best value, or fixed."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from dashboards.analysis.param_effects import (
    boundary_optimum,
    difference_to_winner,
    diverged_from,
    is_numeric_setting,
    is_valid,
    known_values,
    levels,
    matched_difference,
    midpoint,
    mostly_diverged_from,
    round_value,
)
from dashboards.analysis.sweep_frame import SweepFrame
from dashboards.diagnosis.findings import Advice, DiagnosisFinding, Direction, lower_first
from dashboards.formatting import format_brief, format_value
from orchestrator.spec.search.dimensions import Choice, Dimension, IntUniform, LogUniform, Uniform
from trainer.results import clause

_BEST_SHARE = 0.3
"""Share of the ranked trials whose values span the next continuous range."""
_MIN_TRIALS = 3


@dataclass(frozen=True, slots=True)
class NextRange:
    """Next dimension of a setting and the reason; without a dimension it is fixed at the winner's value."""

    dimension: Dimension | None
    reason: str


def next_range(
    frame: SweepFrame, path: str, advised: tuple[DiagnosisFinding, Advice] | None, harm: DiagnosisFinding | None = None
) -> NextRange:
    """Return the next range of a setting that the winner has.

    Args:
        frame: the sweep.
        path: the setting.
        advised: the diagnosis's step for this setting, with its finding.
        harm: the serious finding that the winner's objective does not show; no range is extended then.
    """
    if advised is None or advised[1].direction is Direction.EXCLUDE:
        return _inside(frame, path, harm)
    finding, step = advised
    if step.direction is Direction.FIX:
        return NextRange(None, _without_effect(frame, path))
    dimension = frame.space.dimensions.get(path)
    if finding.rule == "at_the_edge":
        ranged = isinstance(dimension, (Uniform, LogUniform, IntUniform))
        return _continuous_range(frame, path, dimension, step) if ranged else _extended_range(frame, path, step)
    return _one_sided(frame, path, finding, step)


def _inside(frame: SweepFrame, path: str, harm: DiagnosisFinding | None) -> NextRange:
    """Narrow the range, without a step past its ends."""
    dimension = frame.space.dimensions.get(path)
    if isinstance(dimension, (Uniform, LogUniform, IntUniform)):
        return _continuous_range(frame, path, dimension, None)
    if not is_numeric_setting(frame, path):
        return _best_choices(frame, path)
    found = boundary_optimum(frame, path)
    if found is None or not found.extension:
        return _refined_range(frame, path)
    value = format_value(found.value)
    if harm is not None and found.inner is not None:
        values = sorted([found.inner, found.value])
        beyond = "below" if found.is_low_end else "above"
        return NextRange(_choice(frame, path, values), f"not {beyond} {value}: {lower_first(harm.title)}")
    unstable_from = mostly_diverged_from(frame, path)
    if not found.is_low_end and unstable_from is not None and unstable_from <= found.value:
        return replace(_refined_range(frame, path), reason=f"not above {value}: {_most_of(unstable_from)}")
    return _refined_range(frame, path)


def _one_sided(frame: SweepFrame, path: str, finding: DiagnosisFinding, step: Advice) -> NextRange:
    """Search from the winner's value in the direction of the step only."""
    at, dimension = _winner_value(frame, path), frame.space.dimensions.get(path)
    lower = step.direction is Direction.LOWER
    reason = f"{'downwards' if lower else 'upwards'} from {format_value(at)}: {lower_first(finding.title)}"
    if step.values:
        kept = [] if finding.rule == "worse_than_start" else [at]
        return NextRange(_choice(frame, path, sorted([*step.values, *kept])), reason)
    tested = known_values(frame, path)
    inner = next((v for v in (reversed(tested) if lower else tested) if (v < at if lower else v > at)), None)
    limit = None if lower else diverged_from(frame, path)
    if inner is not None or limit is not None:
        end = midpoint(frame, path, at, min(v for v in (inner, limit) if v is not None))
    else:
        end = round_value(at / 2 if lower else at * 2)
    if isinstance(dimension, (Uniform, LogUniform, IntUniform)):
        return NextRange(_with_ends(dimension, *sorted((at, inner if inner is not None else end))), reason)
    choice = _choice(frame, path, sorted([at, end]))
    if len(choice.choice) < 2 or not is_valid(frame, path, choice.choice[0 if lower else 1]):
        return NextRange(None, f"{clause(reason)}; no valid value lies there")
    return NextRange(choice, reason)


def _winner_value(frame: SweepFrame, path: str) -> float:
    winner = frame.ranked[0]
    return float(winner.record.params.get(path, winner.config.flat_params()[path]))


def _without_effect(frame: SweepFrame, path: str) -> str:
    values = [level.value for level in levels(frame, path)]
    found = [c for k, a in enumerate(values) for b in values[k + 1 :] if (c := matched_difference(frame, path, a, b))]
    widest = max((difference for difference, _ in found), key=lambda d: abs(d.mean))
    return (
        f"its values are not distinguishable (at most {format_brief(abs(widest.mean))} between them, 95 % interval "
        f"{format_brief(widest.joint_low)} to {format_brief(widest.joint_high)})"
    )


def _extended_range(frame: SweepFrame, path: str, step: Advice) -> NextRange:
    at = _winner_value(frame, path)
    where = "lowest" if step.direction is Direction.LOWER else "highest"
    best = {level.value: level.best for level in levels(frame, path)}
    inner = [v for v in best if (v > at if step.direction is Direction.LOWER else v < at)]
    next_to = None if not inner else inner[0] if step.direction is Direction.LOWER else inner[-1]
    best_text = "" if next_to is None else f" (best {format_brief(best[at])}, next to it {format_brief(best[next_to])})"
    return NextRange(
        _choice(frame, path, sorted([at, *step.values])),
        f"the best value is the {where} tried{best_text}, so the optimum may lie outside",
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
    known = [trial.record.params.get(path, trial.config.flat_params().get(path)) for trial in frame.trials]
    is_integer = all(isinstance(value, int) for value in known if value is not None)
    choices: list[Any] = [round(v) if is_integer else v for v in values]
    return Choice(choice=tuple(dict.fromkeys(choices)))


def _best_choices(frame: SweepFrame, path: str) -> NextRange:
    """Keep the categorical values that are not clearly worse than the winner's."""
    winner = frame.ranked[0].record.params[path]
    remaining, dropped = [winner], list[str]()
    for level in levels(frame, path):
        if repr(level.value) == repr(winner):
            continue
        difference = difference_to_winner(frame, path, level)
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


def _continuous_range(
    frame: SweepFrame, path: str, dimension: Uniform | LogUniform | IntUniform, step: Advice | None
) -> NextRange:
    """Span the best trials' values; extend the range by the step past its end, if there is one."""
    ranked = [trial for trial in frame.ranked if path in trial.record.params]
    count = max(_MIN_TRIALS, math.ceil(_BEST_SHARE * len(ranked)))
    values = [float(trial.record.params[path]) for trial in ranked[:count]]
    if step is None and (len(values) < 2 or min(values) == max(values)):
        return NextRange(dimension, "unchanged: too few trials to narrow it")
    low, high = min(values), max(values)
    reason = f"range of the best {len(values)} of {len(ranked)} trials"
    if step is not None:
        is_low_end, end = step.direction is Direction.LOWER, step.values[0]
        low, high = (min(low, end), high) if is_low_end else (low, max(high, end))
        reason += f", extended past the {'lower' if is_low_end else 'upper'} end, where the best trial lies"
    else:
        found, unstable_from = boundary_optimum(frame, path), mostly_diverged_from(frame, path)
        if found is not None and not found.is_low_end and unstable_from is not None and unstable_from <= found.value:
            reason += f"; not extended: {_most_of(unstable_from)}"
    limit = diverged_from(frame, path)
    if limit is not None and high >= limit:
        high = midpoint(frame, path, max(values), limit)
        reason += f"; all trials from {format_value(limit)} upwards diverged"
    match dimension:
        case LogUniform():
            low, high = round_value(low), _round_up(high)
        case Uniform():
            low, high = _round_down(low), _round_up(high)
        case IntUniform():
            pass
    return NextRange(_with_ends(dimension, low, high), reason)


def _with_ends(dimension: Uniform | LogUniform | IntUniform, low: float, high: float) -> Dimension:
    match dimension:
        case IntUniform():
            return IntUniform(int_uniform=(math.floor(low), math.ceil(high)), log=dimension.log)
        case LogUniform():
            return LogUniform(log_uniform=(low, high))
        case Uniform():
            return Uniform(uniform=(low, high))


def _round_up(value: float) -> float:
    rounded = round_value(value)
    return rounded if rounded >= value else round_value(value * 1.1 if value > 0 else value * 0.9)


def _round_down(value: float) -> float:
    rounded = round_value(value)
    return rounded if rounded <= value else value
