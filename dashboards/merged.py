"""All trials of several sweeps as one sweep, ranked by the ruler that no objective scales."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from dashboards.frame import TrialView, short_names
from dashboards.sweep_frame import SweepFrame, TrialCase
from orchestrator.spec.goal import Goal
from orchestrator.spec.space import Choice, SearchSpace
from trainer.metrics import COMMON_RULER

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
