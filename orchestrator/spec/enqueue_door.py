"""The file's `enqueue`: trials that run first, each a mapping of leaves to values; other leaves are as in `base`."""

from __future__ import annotations

from typing import Any, cast

from orchestrator.spec.dimensions import Scalar
from orchestrator.spec.document import Loc
from orchestrator.spec.given import problems
from orchestrator.spec.goal import Goal
from orchestrator.spec.place import place
from orchestrator.spec.problems import Findings, show
from orchestrator.spec.space import SearchSpace
from trainer.config import TrialConfig

KEY = "enqueue"


def build_enqueue(
    findings: Findings, given: Any, search: SearchSpace, base: TrialConfig, goals: tuple[Goal, ...]
) -> tuple[dict[str, Scalar], ...] | None:
    """The given trials, in order; each is a legal trial, though its values may lie outside what is searched."""
    if given is None:
        return ()
    if not isinstance(given, tuple):
        findings.add((KEY,), f"must be a list of mappings from leaves to values, not {show(given)}")
        return None
    before = len(findings.items)
    out: list[dict[str, Scalar]] = []
    seen: list[Any] = []
    for i, one in enumerate(cast(tuple[Any, ...], given)):
        loc: Loc = (KEY, i)
        if not isinstance(one, dict) or not one:
            findings.add(loc, f"must be a mapping from leaves to values, not {show(one)}")
            continue
        leaves = cast(dict[str, Any], one)
        wrong = [(p, f"one trial has one value, not {show(v)}", "") for p, v in leaves.items() if _several(v)]
        for goal in () if wrong else goals:
            wrong += [problem for problem in problems(base, search, goal, leaves) if problem not in wrong]
        for path, problem, hint in wrong:
            findings.add((*loc, path), problem, hint)
        if wrong:
            continue
        identity = place(base, leaves).identity()
        if identity in seen:
            findings.add(loc, f"equals entry {seen.index(identity)}")
        seen.append(identity)
        out.append(leaves)
    return tuple(out) if len(findings.items) == before else None


def _several(value: Any) -> bool:
    return isinstance(value, tuple | dict)
