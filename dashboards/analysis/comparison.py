"""Several sweeps side by side, by the one ruler that no objective scales; and whether they may be compared at all.

Whether sweeps may be compared: the same data, start model, tokens and pairs per update, each told where not.

All trials of several sweeps as one sweep, ranked by the ruler that no objective scales.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dashboards.analysis.held_out_pairs import per_pair
from dashboards.analysis.run_costs import costs
from dashboards.analysis.significance import Certainty, Difference, certainty, paired_difference
from dashboards.analysis.sweep_frame import SweepFrame, TrialCase, TrialView, short_names, show
from dashboards.diagnosis.diagnose import Insight
from orchestrator.spec.objectives import Goal
from orchestrator.spec.search.space import Choice, SearchSpace
from orchestrator.study.importance import importance
from trainer.metrics import COMMON_RULER, EVAL

_TOKENS = 1.05
"""Tokens of the compared trials may differ by this factor: lengths of the drawn pairs vary."""
_EFFORT = 1.5
_START = f"{EVAL}logps_per_token/chosen"

Entry = tuple[SweepFrame, TrialCase | None]


def mismatches(entries: Sequence[Entry]) -> list[str]:
    """What is not matched between these sweeps and their best trials, in words with the numbers."""
    told = [
        _differ("the data differs", entries, lambda f, _: None if f.data is None else f.data.fingerprint[:12]),
        _held_out(entries),
        _differ("the start models differ", entries, lambda f, _: _model(f)),
        _starts(entries),
        _differ("pairs per update differ", entries, lambda _, c: None if c is None else str(_pairs(c))),
        _differ("updates differ", entries, lambda _, c: None if c is None else f"{c.view.step:,}"),
        _tokens(entries),
        _differ("precision differs", entries, lambda f, _: _precision(f)),
        _differ("what is trained differs", entries, lambda f, _: "LoRA" if f.spec.base.lora else "all weights"),
        _effort(entries),
    ]
    unfinished = [f"{frame.name} is {frame.state}" for frame, _ in entries if frame.state != "finished"]
    return [line for line in told if line] + [f"{words}: this is how it stands now." for words in unfinished]


def _differ(what: str, entries: Sequence[Entry], of: Callable[[SweepFrame, TrialCase | None], str | None]) -> str:
    known = [(frame.name, value) for frame, case in entries if (value := of(frame, case)) is not None]
    if len({value for _, value in known}) < 2:
        return ""
    return f"Not matched: {what} (" + "; ".join(f"{name}: {value}" for name, value in known) + ")."


def _pairs(case: TrialCase) -> int:
    return case.config.training.pairs_per_update


def _model(frame: SweepFrame) -> str:
    base, sft = frame.spec.base, frame.spec.sft
    name = base.model.name_or_path or "generated"
    after = "" if sft is None else f" after {sft.training.max_steps or 'some'} updates of sft"
    return f"{name}{after}"


def _precision(frame: SweepFrame) -> str:
    base = frame.spec.base
    return f"{base.model.dtype}{' with bf16 autocast' if base.training.bf16 else ''}"


def _starts(entries: Sequence[Entry]) -> str:
    """Measured, where names say nothing: the start's log-prob of the held-out pairs."""
    known = [(frame.name, value) for frame, _ in entries if (value := frame.start(_START)) is not None]
    if len(known) < 2 or all(math.isclose(value, known[0][1], rel_tol=1e-4) for _, value in known):
        return ""
    listed = "; ".join(f"{name}: {show(value)}" for name, value in known)
    return f"Not matched: the start models see the held-out pairs differently (log-prob per chosen token {listed})."


def _held_out(entries: Sequence[Entry]) -> str:
    known = [(frame.name, case.pairs) for frame, case in entries if case is not None and case.pairs is not None]
    if len(known) < len([case for _, case in entries if case is not None]):
        return "Some trials left no held-out pairs: differences to them have no interval."
    if not known or all(pairs.same_pairs(known[0][1]) for _, pairs in known):
        return ""
    listed = "; ".join(f"{name}: {len(pairs)}" for name, pairs in known)
    return f"Not matched: the held-out pairs are not the same ({listed}), so differences have no interval."


def _tokens(entries: Sequence[Entry]) -> str:
    known = [(frame.name, case.tokens) for frame, case in entries if case is not None]
    counted = [(name, tokens) for name, tokens in known if tokens is not None]
    if len(counted) < len(known):
        return "The tokens of some trials are not known, so whether they are matched is not either."
    if len(counted) < 2 or max(t for _, t in counted) <= _TOKENS * min(t for _, t in counted):
        return ""
    return "Not matched: tokens of training (" + "; ".join(f"{name}: {tokens:,.0f}" for name, tokens in counted) + ")."


def _effort(entries: Sequence[Entry]) -> str:
    counts = [(frame.name, len(frame.ranked)) for frame, _ in entries if frame.ranked]
    if len(counts) < 2 or max(n for _, n in counts) <= _EFFORT * min(n for _, n in counts):
        return ""
    listed = "; ".join(f"{name}: {n}" for name, n in counts)
    return f"Not matched: the best of many trials looks better than the best of few (complete trials {listed})."


RULER = Goal(metric=COMMON_RULER, direction="maximize")
_NO_MATTER = frozenset(
    f"training.{leaf}" for leaf in ("eval_steps", "save_steps", "logging_steps", "tokens_per_micro_batch", "max_steps")
)
"""Leaves that say how a run is looked at, or that the check of updates says already."""
_TWIN = "loss.gamma_beta_ratio"


def merge(frames: Sequence[SweepFrame]) -> SweepFrame:
    """All trials as one sweep ranked by the ruler: labelled `sweep/number`, told apart by every leaf that varies."""
    first = frames[0]
    placed = [(frame, case, case.config.leaves()) for frame in frames for case in frame.trials]
    searched = list(dict.fromkeys(path for frame in frames for path in frame.paths))
    told = ["loss.kind", *searched, *_fixed_but_different(frames)]
    varied = [p for p in dict.fromkeys(told) if len({repr(leaves.get(p)) for _, _, leaves in placed}) > 1]
    if "loss.gamma" in varied:
        varied = [p for p in varied if p != _TWIN]
    paths = tuple(p for p in varied if all(_scalar(leaves.get(p)) for _, _, leaves in placed))
    cases: list[TrialCase] = []
    for number, (frame, case, leaves) in enumerate(placed):
        value = case.last(COMMON_RULER) if case.record.value is not None else None
        params = {p: leaves[p] for p in paths if p in leaves}
        record = dataclasses.replace(case.record, number=number, params=params, value=value, values=None)
        label = f"{frame.name}/{case.label}"
        cases.append(dataclasses.replace(case, view=TrialView(record, case.view.courses), label=label))
    listed = {
        p: tuple({repr(c.record.params[p]): c.record.params[p] for c in cases if p in c.record.params}.values())
        for p in paths
    }
    return SweepFrame(
        name=" against ".join(frame.name for frame in frames),
        description="",
        goal=RULER,
        paths=paths,
        space=SearchSpace(dimensions={p: Choice(choice=values) for p, values in listed.items() if values}),
        trials=tuple(cases),
        spec=first.spec,
        state="finished" if all(frame.state == "finished" for frame in frames) else "running",
        at=max(frame.at for frame in frames),
        hours=sum(frame.hours for frame in frames),
        data=first.data,
        gpus=any(frame.gpus for frame in frames),
        notices=tuple(notice for frame in frames for notice in frame.notices),
        sweeps=tuple(frame.name for frame in frames),
        short=short_names(paths),
    )


def _fixed_but_different(frames: Sequence[SweepFrame]) -> list[str]:
    """Leaves of the objective and of the training that each sweep fixes, at other values than the others."""
    bases = [frame.spec.base.leaves() for frame in frames]
    shared = set(bases[0]).intersection(*bases[1:])
    return sorted(
        path
        for path in shared
        if path.startswith(("loss.", "training."))
        and path not in _NO_MATTER
        and len({repr(base[path]) for base in bases}) > 1
    )


def _scalar(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str))


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
