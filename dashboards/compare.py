"""Several sweeps side by side, by the one ruler that no objective scales; and whether they may be compared at all."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dashboards.certainty import Certainty, Difference, certainty, paired_difference
from dashboards.costs import costs
from dashboards.insight import Insight
from dashboards.matched import mismatches
from dashboards.merged import merge
from dashboards.pairs import per_pair
from dashboards.sweep_frame import SweepFrame, TrialCase
from orchestrator.study.importance import importance
from trainer.metrics import COMMON_RULER, EVAL

MARGIN = f"{EVAL}margins/logp"
CHOSEN = f"{EVAL}logps_per_token/chosen"
EXACT = f"{EVAL}exact_answers"


@dataclass(frozen=True, slots=True, eq=False)
class Contender:
    """One sweep and its best trial by the ruler; None where no trial completed."""

    frame: SweepFrame
    case: TrialCase | None
    value: float | None
    behind: Difference | None = None
    """The first contender minus this one; None for the first, and where it cannot be told."""

    @property
    def objective(self) -> str:
        """loss.kind, and its type where it has several."""
        loss = (self.case.config if self.case else self.frame.spec.base).loss
        kind = getattr(loss, "loss_type", None)
        plain = kind in (None, "sigmoid")
        return loss.kind if plain else f"{loss.kind} ({kind if isinstance(kind, str) else ' + '.join(kind or ())})"

    @property
    def own_winner(self) -> TrialCase | None:
        """The best by the sweep's own goal."""
        return next(iter(self.frame.ranked), None)


@dataclass(frozen=True, slots=True, eq=False)
class Comparison:
    """Contenders, the best first, what makes the comparison doubtful, and all trials in one frame."""

    contenders: tuple[Contender, ...]
    warnings: tuple[str, ...]
    seen: Insight


def compare(frames: Sequence[SweepFrame]) -> Comparison:
    """Rank these sweeps by the common ruler."""
    found = [_contender(frame) for frame in frames]
    ranked = sorted(found, key=lambda c: (c.value is None, -(c.value or 0.0)))
    first = ranked[0].case
    placed = [ranked[0], *(dataclasses.replace(c, behind=_behind(first, c.case)) for c in ranked[1:])]
    merged = merge(frames)
    sure: Certainty | None = certainty(merged)
    weights = importance(merged.space, [case.record for case in merged.trials], merged.goal)
    warnings = [*mismatches([(c.frame, c.case) for c in placed]), *_own_choices(placed)]
    return Comparison(tuple(placed), tuple(warnings), Insight(merged, sure, (), weights))


def _contender(frame: SweepFrame) -> Contender:
    known = [(value, case) for case in frame.ranked if (value := case.last(COMMON_RULER)) is not None]
    if not known:
        return Contender(frame, None, None)
    value, case = max(known, key=lambda row: row[0])
    return Contender(frame, case, value)


def _behind(first: TrialCase | None, other: TrialCase | None) -> Difference | None:
    if first is None or other is None or first.pairs is None or other.pairs is None:
        return None
    if not first.pairs.same_pairs(other.pairs):
        return None
    ours = per_pair(COMMON_RULER, first.pairs, first.config.loss)
    theirs = per_pair(COMMON_RULER, other.pairs, other.config.loss)
    return None if ours is None or theirs is None else paired_difference(ours, theirs, COMMON_RULER)


def _own_choices(contenders: Sequence[Contender]) -> list[str]:
    return [
        f"{c.frame.name}: its own goal ({c.frame.goal.metric}) chose trial {own.label}, the ruler trial {c.case.label}."
        for c in contenders
        if c.case is not None and (own := c.own_winner) is not None and own is not c.case
    ]


def as_json(found: Comparison) -> dict[str, Any]:
    """For `--json`."""
    rows: list[dict[str, Any]] = []
    for place, c in enumerate(found.contenders, 1):
        spent = costs(c.frame.trials)
        rows.append(
            {
                "place": place if c.case else None,
                "sweep": c.frame.name,
                "objective": c.objective,
                "trial": None if c.case is None else c.case.number,
                "params": {} if c.case is None else dict(c.case.record.params),
                COMMON_RULER: c.value,
                MARGIN: None if c.case is None else c.case.last(MARGIN),
                "start": c.frame.start(COMMON_RULER),
                "chosen_change": None if c.case is None else c.case.change(CHOSEN),
                EXACT: None if c.case is None else c.case.last(EXACT),
                "behind": None
                if c.behind is None
                else {"mean": c.behind.mean, "low": c.behind.low, "high": c.behind.high, "clear": c.behind.clear},
                "complete": len(c.frame.ranked),
                "trials": len(c.frame.trials),
                "updates": None if c.case is None else c.case.view.step,
                "tokens": None if c.case is None else c.case.tokens,
                "slot_hours": spent.seconds / 3600,
            }
        )
    return {"ruler": COMMON_RULER, "sweeps": rows, "warnings": list(found.warnings)}
