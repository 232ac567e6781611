"""The file's `maximize` and `minimize`: one metric, or several for a Pareto front."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast

from orchestrator.spec.answers import eval_rows_have_answers
from orchestrator.spec.document import Loc
from orchestrator.spec.goal import Goal
from orchestrator.spec.objective import check_answers, check_kind, check_metric, check_ruler, needs_answers
from orchestrator.spec.place import KIND
from orchestrator.spec.problems import Findings, show
from orchestrator.spec.search_door import loc_of
from orchestrator.spec.space import SearchSpace
from trainer.config import TrialConfig
from trainer.metrics import COMMON_RULER

_DIRECTIONS: tuple[Literal["maximize", "minimize"], ...] = ("maximize", "minimize")


def build_goals(
    findings: Findings, tree: dict[str, Any], search: SearchSpace | None, base: TrialConfig | None
) -> tuple[Goal, ...] | None:
    """What the trials are ranked by, those to maximize first; the common ruler where nothing is said."""
    searched = search.paths if search is not None else _searched(tree)
    for path in check_ruler(searched):
        problem = f"{path} decides what is held out or how it is measured, so trials that differ in it cannot be ranked"
        where = loc_of(search.zipped if search is not None else (), path)
        findings.add(where, problem, "give it one value in base, and make a sweep for each other value")
    goals: list[Goal] = []
    before = len(findings.items)
    for direction in _DIRECTIONS:
        given = tree.get(direction)
        listed: tuple[Any, ...] = () if given is None else (given,)
        if isinstance(given, tuple):
            listed = cast(tuple[Any, ...], given)
        if isinstance(given, tuple) and not listed:
            findings.add((direction,), "the list is empty")
        for i, metric in enumerate(listed):
            loc: Loc = (direction, i) if isinstance(given, tuple) else (direction,)
            if not isinstance(metric, str):
                findings.add(loc, f"must be the name of a metric, not {show(metric)}")
            elif any(goal.metric == metric for goal in goals):
                findings.add(loc, f"{metric} is a goal already")
            elif (
                problem := _problem(metric, direction, searched, base) or _other_kind(metric, search, base)
            ) is not None:
                findings.add(loc, *problem)
            else:
                goals.append(Goal(metric=metric, direction=direction))
    if len(findings.items) > before:
        return None
    if goals:
        return tuple(goals)
    problem = _problem(COMMON_RULER, "maximize", searched, base)
    if problem is not None:
        findings.add(("maximize",), *problem)
        return None
    return (Goal(metric=COMMON_RULER, direction="maximize"),)


def _problem(metric: str, direction: str, searched: Sequence[str], base: TrialConfig | None) -> tuple[str, str] | None:
    problem = check_metric(metric, direction, searched)
    if problem is None and base is not None:
        problem = check_answers(metric, base.evaluation)
        if problem is None and needs_answers(metric) and not eval_rows_have_answers(base.data):
            problem = ("the held-out rows carry no right answer", "give their column as columns: {answer: COLUMN}")
    return problem


def _other_kind(metric: str, search: SearchSpace | None, base: TrialConfig | None) -> tuple[str, str] | None:
    if base is None or search is None:
        return None
    return check_kind(metric, search.drawable(KIND) or (base.loss.kind,))


def _searched(tree: dict[str, Any]) -> list[str]:
    given = tree.get("search")
    return [str(path) for path in cast(dict[str, Any], given)] if isinstance(given, dict) else []
