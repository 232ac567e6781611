"""Which region works: the goal over two leaves, one map for each value of a third (for SimPO beta x gamma by rate)."""

from __future__ import annotations

from dashboards.blocks import Charts, Panel
from dashboards.cells import MARKS, cells
from dashboards.effects import is_numeric, values_of
from dashboards.insight import Insight
from dashboards.scatter import points
from dashboards.seeds import SEED
from dashboards.sweep_frame import SweepFrame

_MOST_VALUES = 14
_MOST_MAPS = 9
_GAMMAS = ("loss.gamma", "loss.gamma_beta_ratio")
_RATE = "training.learning_rate"


def panel(seen: Insight) -> Panel | None:
    """A map of cells where the leaves have few values, of points where they were drawn from ranges."""
    frame = seen.frame
    leaves = plane(seen)
    if len(leaves) < 1 or len(frame.trials) < 2:
        return None
    values = [value for case in frame.trials if (value := frame.value(case)) is not None]
    span = (min(values), max(values)) if values else (0.0, 1.0)
    names = [frame.short.get(leaf, leaf) for leaf in leaves]
    lead = f"{frame.goal.metric} of the best complete trial; brighter is better.{_legend(frame)}"
    if len(leaves) == 1:
        return Panel("map", f"Which {names[0]} works", lead, (Charts((cells(frame, leaves[0], None, None, span),)),))
    if any(len(values_of(frame, leaf)) > _MOST_VALUES for leaf in leaves[:2]):
        chart = points(frame, leaves[0], leaves[1], span)
        lead = f"{frame.goal.metric} of every trial; brighter is better.{_legend(frame)}"
        return Panel("map", f"Which {names[1]} and {names[0]} work", lead, (Charts((chart,), wide=True),))
    if len(leaves) == 2:
        maps = [cells(frame, leaves[0], leaves[1], None, span)]
    else:
        shown = values_of(frame, leaves[2])[:_MOST_MAPS]
        maps = [cells(frame, leaves[0], leaves[1], (leaves[2], value), span) for value in shown]
    return Panel("map", f"Which {names[1]} and {names[0]} work", lead, (Charts(tuple(maps)),))


def _legend(frame: SweepFrame) -> str:
    """The marks that are there to be seen."""
    marks = [mark for word, mark in MARKS.items() if any(case.end_word == word for case in frame.trials)]
    return f" {', '.join(marks)}." if marks else ""


def plane(seen: Insight) -> tuple[str, ...]:
    """x, y and the leaf by which maps are split: beta, gamma and the rate where searched, else the most important."""
    frame = seen.frame
    varied = [p for p in frame.paths if p != SEED and len(values_of(frame, p)) > 1]
    gamma = next((p for p in _GAMMAS if p in varied), None)
    if gamma is not None and "loss.beta" in varied:
        first = [gamma, "loss.beta", *([_RATE] if _RATE in varied else [])]
    else:
        first = []
    weight = seen.importances
    rest = sorted(varied, key=lambda p: (not is_numeric(frame, p), -weight.get(p, 0.0), varied.index(p)))
    chosen = list(dict.fromkeys([*first, *rest]))[:3]
    if len(chosen) > 2 and len(values_of(frame, chosen[2])) > _MOST_MAPS:
        chosen = chosen[:2]
    return tuple(chosen)
