"""The keys of the file into the parts of a SweepSpec; what is wrong with one part hides nothing of another."""

from __future__ import annotations

from typing import Any, TypeVar, cast

from pydantic import BaseModel

from orchestrator.errors import nearest
from orchestrator.folders import NAME
from orchestrator.spec import corners
from orchestrator.spec.answers import eval_rows_have_answers
from orchestrator.spec.document import Loc
from orchestrator.spec.objective import check_answers, check_metric, check_ruler, needs_answers
from orchestrator.spec.problems import SOURCES, Findings, models_in, show
from orchestrator.spec.search_door import build_search, loc_of
from orchestrator.spec.space import SearchSpace
from orchestrator.spec.sweep import (
    DOOR,
    Budget,
    Goal,
    GridSampler,
    Resources,
    Sampler,
    SftStage,
    SweepSpec,
    Tracking,
)
from trainer.config import TrialConfig
from trainer.metrics import COMMON_RULER

M = TypeVar("M", bound=BaseModel)

SAMPLERS: dict[str, type[BaseModel]] = {m.model_fields["kind"].default: m for m in models_in(Sampler)}
PRUNERS = ("none",)
ORIGINS = tuple(SOURCES.values())


def build(findings: Findings, tree: dict[str, Any]) -> SweepSpec | None:
    """The sweep, or None and what is wrong in `findings`."""
    for key in tree:
        if key not in DOOR:
            findings.unknown((key,), list(DOOR))
    base = _base(findings, tree)
    search = build_search(findings, tree.get("search"))
    if base is not None and search is not None:
        search = _corners(findings, search, base)
    budget = _section(findings, Budget, tree, "budget")
    sampler = _sampler(findings, tree.get("sampler"))
    if search is not None and sampler is not None and budget is not None:
        _ends(findings, sampler, search, budget)
    _pruner(findings, tree.get("pruner"))
    parts = {
        "name": _name(findings, tree),
        "base": base,
        "search": search,
        "sampler": sampler,
        "goal": _goal(findings, tree, search, base),
        "budget": budget,
        "resources": _section(findings, Resources, tree, "resources"),
        "tracking": _section(findings, Tracking, tree, "tracking"),
        "sft": _sft(findings, tree.get("sft")),
    } | {key: tree[key] for key in ("description", "keep_models", "storage") if key in tree}
    built = {key: part for key, part in parts.items() if part is not None}
    spec = findings.build(SweepSpec, built, (), said=frozenset(parts.keys() - built.keys()))
    return None if findings.items else spec


def _section(findings: Findings, model: type[M], tree: dict[str, Any], key: str) -> M | None:
    given = tree.get(key)
    return findings.build(model, {} if given is None else given, (key,))


def _name(findings: Findings, tree: dict[str, Any]) -> str | None:
    name = tree.get("name")
    if name is None:
        findings.add(("name",), "is required", "it names the sweep's folder and its run in MLflow")
    elif not isinstance(name, str):
        findings.add(("name",), f"must be text, not {show(name)}", f'quote it: "{name}"')
    elif not NAME.fullmatch(name):
        findings.add(("name",), f"{show(name)} must be 1 to 64 letters, digits, . _ or -, the first a letter or digit")
    else:
        return name
    return None


def _base(findings: Findings, tree: dict[str, Any]) -> TrialConfig | None:
    if tree.get("base") is None:
        findings.add(("base",), "is required", "one whole trial: model, data, loss, training")
        return None
    wrong = _origins(findings, tree["base"], ("base",))
    return findings.build(TrialConfig, tree["base"], ("base",), wrong=wrong)


def _sft(findings: Findings, given: Any) -> SftStage | None:
    if given is None:
        return None
    return findings.build(SftStage, given, ("sft",), wrong=_origins(findings, given, ("sft",)))


def _origins(findings: Findings, tree: Any, loc: Loc) -> frozenset[Loc]:
    """Sources of which nobody can say what they are; those are reported here, in one sentence each."""
    wrong: set[Loc] = set()
    data = cast(dict[str, Any], tree).get("data") if isinstance(tree, dict) else None
    for split in ("train", "eval"):
        sources = cast(dict[str, Any], data).get(split) if isinstance(data, dict) else None
        for i, source in enumerate(_list(sources)):
            inner: Loc = ("data", split, i)
            keys = list(cast(dict[str, Any], source)) if isinstance(source, dict) else list[str]()
            known = [key for key in ORIGINS if key in keys]
            if len(known) != 1:
                near = next((n for key in keys if (n := nearest(key, ORIGINS))), None)
                problem = (
                    f"needs exactly one of {', '.join(ORIGINS)}; it has {', '.join(known or keys) or show(source)}"
                )
                findings.add((*loc, *inner), problem, f"did you mean {near}?" if near and not known else "")
                wrong.add(inner)
    return frozenset(wrong)


def _corners(findings: Findings, search: SearchSpace, base: TrialConfig) -> SearchSpace | None:
    """The search with its values as their leaves have them (2 becomes 2.0), or None and what is no trial."""
    found = corners.problems(search, base)
    for problem in found:
        loc = _value_loc(findings, search, problem)
        findings.add(loc, problem.problem, problem.hint)
    return None if found else corners.as_leaves(search, base)


def _value_loc(findings: Findings, search: SearchSpace, problem: corners.Problem) -> Loc:
    loc = loc_of(search.zipped, problem.path)
    for i, value in enumerate(search.listed(problem.path)):
        if type(value) is type(problem.value) and value == problem.value:
            written = [(*loc, i), *((*loc, kind, i) for kind in ("choice", "uniform", "log_uniform", "int_uniform"))]
            return next((w for w in written if w in findings.document.lines), loc)
    return loc


def _sampler(findings: Findings, given: Any) -> Sampler | None:
    kind: Any = cast(dict[str, Any], given).get("kind") if isinstance(given, dict) else given
    if given is None:
        return GridSampler()
    model = SAMPLERS.get(kind) if isinstance(kind, str) else None
    if model is None:
        loc: Loc = ("sampler", "kind") if isinstance(given, dict) else ("sampler",)
        near = nearest(str(kind), SAMPLERS)
        hint = f"did you mean {near}?" if near else ""
        findings.add(loc, f"must be one of {', '.join(SAMPLERS)}; not {show(kind)}", hint)
        return None
    body = cast(dict[str, Any], given) if isinstance(given, dict) else {"kind": kind}
    return cast("Sampler | None", findings.build(model, body, ("sampler",)))


def _ends(findings: Findings, sampler: Sampler, search: SearchSpace, budget: Budget) -> None:
    """A sweep must come to an end."""
    size = search.size()
    if isinstance(sampler, GridSampler):
        for path in search.paths if size is None else ():
            if search.endless(path):
                findings.add(
                    ("search", path), "the grid sampler needs a list, or a range with step", "or sampler: random"
                )
    elif budget.trials is None and budget.hours is None:
        findings.add(("budget",), f"sampler {sampler.kind} draws without end", "give budget.trials or budget.hours")


def _pruner(findings: Findings, given: Any) -> None:
    kind: Any = cast(dict[str, Any], given).get("kind") if isinstance(given, dict) else given
    if given is not None and kind not in PRUNERS:
        findings.add(("pruner",), f"must be one of {', '.join(PRUNERS)}; not {show(kind)}")


def _goal(
    findings: Findings, tree: dict[str, Any], search: SearchSpace | None, base: TrialConfig | None
) -> Goal | None:
    given = [d for d in ("maximize", "minimize") if tree.get(d) is not None]
    if len(given) > 1:
        findings.add((given[1],), "a sweep has one goal, and both maximize and minimize are given", "leave one out")
        return None
    direction = given[0] if given else "maximize"
    metric = tree[direction] if given else COMMON_RULER
    if not isinstance(metric, str):
        findings.add((direction,), f"must be the name of a metric, not {show(metric)}")
        return None
    searched = search.paths if search is not None else [str(p) for p in cast(dict[str, Any], _mapping(tree, "search"))]
    for path in check_ruler(searched):
        problem = f"{path} decides what is held out or how it is measured, so trials that differ in it cannot be ranked"
        findings.add(
            loc_of(search.zipped if search is not None else (), path),
            problem,
            "give it one value in base, and make a sweep for each other value",
        )
    problem = check_metric(metric, direction, searched)
    if problem is None and base is not None:
        problem = check_answers(metric, base.evaluation)
        if problem is None and needs_answers(metric) and not eval_rows_have_answers(base.data):
            problem = ("the held-out rows carry no right answer", "give their column as columns: {answer: COLUMN}")
    if problem is not None:
        findings.add((direction,), *problem)
        return None
    return Goal(metric=metric, direction="maximize" if direction == "maximize" else "minimize")


def _mapping(tree: dict[str, Any], key: str) -> Any:
    given = tree.get(key)
    return cast(Any, given) if isinstance(given, dict) else {}


def _list(given: Any) -> tuple[Any, ...]:
    return cast(tuple[Any, ...], given) if isinstance(given, tuple) else ()
