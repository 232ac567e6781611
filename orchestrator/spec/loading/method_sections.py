"""Loads `sampler`, `order`, `pruner`, `warm_start`, `maximize`, `minimize` and `require`.

A method is a name alone, or a mapping with its `kind`. Objectives are one metric, or several for a Pareto front.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

from pydantic import BaseModel

from orchestrator.errors import closest_match
from orchestrator.folders import SWEEP_NAME_PATTERN
from orchestrator.spec.judge_config import JudgeConfig
from orchestrator.spec.loading.right_forms import method_form
from orchestrator.spec.loading.search_section import location_of
from orchestrator.spec.loading.validation_errors import ErrorCollector, describe_value, models_in
from orchestrator.spec.objectives import (
    Objective,
    check_completion_metric,
    check_fixed_evaluation,
    check_kind,
    check_metric,
    eval_rows_have_answers,
    requires_answers,
    unmeasured_reason,
)
from orchestrator.spec.pruners import NoPruner, PatientPruner, Pruner, WilcoxonPruner, pruning_metric
from orchestrator.spec.requirements import OFF, RIGHT_FORM, Requirement, check_required_metric, default_requirements
from orchestrator.spec.samplers import (
    AdaptiveSampler,
    CmaEsSampler,
    GridSampler,
    Order,
    Reproducible,
    Sampler,
    StagedSampler,
    check_stages,
)
from orchestrator.spec.search.dimensions import is_numeric_dimension
from orchestrator.spec.search.space import Grid, SearchSpace
from orchestrator.spec.search.trial_params import LOSS_KIND, SEED, apply_params
from orchestrator.spec.sweep_spec import CONFIRM_SHARE, Budget
from trainer.config.trial import TrialConfig
from trainer.config.yaml_files import Location
from trainer.metrics import COMPARISON_METRIC, EXACT_ANSWERS, lookup


def _kinds(union: Any) -> dict[str, type[BaseModel]]:
    return {m.model_fields["kind"].default: m for m in dict.fromkeys(models_in(union))}


SAMPLERS = _kinds(Sampler)
ORDERS = _kinds(Order)
PRUNERS = _kinds(Pruner)


def load_sampler(problems: ErrorCollector, given: Any) -> Sampler | None:
    """Load `sampler`, by default the grid; None if it is invalid."""
    return _load_kind(problems, ("sampler",), given, SAMPLERS, GridSampler())


def load_order(problems: ErrorCollector, given: Any) -> Order | None:
    """Load `order`, the visibility rule; None if it is invalid."""
    return _load_kind(problems, ("order",), given, ORDERS, Reproducible())


def load_pruner(problems: ErrorCollector, given: Any) -> Pruner | None:
    """Load `pruner`; without it, none for now (`SweepSpec.default_pruner` is for new sweeps); None if it is invalid."""
    if isinstance(given, dict) and isinstance(wrapped := cast(dict[str, Any], given).get("wrapped"), str):
        given = cast(dict[str, Any], given) | {"wrapped": {"kind": wrapped}}
    return _load_kind(problems, ("pruner",), given, PRUNERS, NoPruner())


def _load_kind(
    problems: ErrorCollector, loc: Location, given: Any, kinds: dict[str, type[BaseModel]], default: Any
) -> Any:
    if given is None:
        return default
    body = cast(dict[str, Any], given) if isinstance(given, dict) else {"kind": given}
    kind = body.get("kind")
    model = kinds.get(kind) if isinstance(kind, str) else None
    if model is None:
        near = closest_match(str(kind), kinds)
        where = (*loc, "kind") if isinstance(given, dict) else loc
        hint = method_form(str(loc[0]), kind, body, kinds) or (f"did you mean {near}?" if near else "")
        problems.add(where, f"must be one of {', '.join(kinds)}; not {describe_value(kind)}", hint)
        return None
    return problems.validate(model, body, loc)


def settle_grid_order(
    sampler: Sampler,
    given: Any,
    search: SearchSpace,
    base: TrialConfig,
    budget: Budget,
    enqueue: Sequence[Mapping[str, Any]],
    repeats: int,
) -> Sampler:
    """Return the sampler; a grid that `budget.trials` ends early is shuffled, unless the file says its order.

    Else the budget would try the first values of the first settings only.
    """
    says = isinstance(given, dict) and "order" in given
    size = search.size()
    if not isinstance(sampler, GridSampler) or says or budget.trials is None or size is None:
        return sampler
    if size <= _COUNTED:
        points = [apply_params(base, point).canonical_params() for point in Grid(search, base)]
        given_points = [apply_params(base, params).canonical_params() for params in enqueue]
        size = len(points) + sum(point not in points for point in given_points)
    return sampler.model_copy(update={"order": "shuffled"}) if size * repeats > budget.trials else sampler


_COUNTED = 2_000
"""Points of a grid up to which equal ones are counted once, to decide whether the budget ends it early."""


def check_sampler(
    problems: ErrorCollector,
    sampler: Sampler,
    search: SearchSpace,
    budget: Budget,
    objectives: tuple[Objective, ...] | None,
) -> None:
    """Report a sampler that would never end or that does not suit the search space."""
    match sampler:
        case GridSampler():
            for path in search.paths if search.size() is None else ():
                if search.is_continuous(path):
                    hint = "or sampler: random"
                    problems.add(("search", path), "the grid sampler needs a list, or a range with step", hint)
        case StagedSampler():
            for where, problem, hint in check_stages(sampler, search):
                problems.add(("sampler", *where), problem, hint)
        case _:
            limits = (budget.trials, budget.hours, budget.gpu_hours)
            if search.size() is None and limits == (None, None, None):
                problem = f"sampler {sampler.kind} never ends by itself"
                problems.add(("budget",), problem, "give budget.trials, budget.hours or budget.gpu_hours")
            if isinstance(sampler, AdaptiveSampler) and not search.paths:
                problems.add(("sampler",), f"sampler {sampler.kind} has nothing to search", "give search")
    if isinstance(sampler, CmaEsSampler) and len(moved := _numeric_paths(search)) < 2:
        found = f"only {moved[0]}" if moved else "none"
        problem = "sampler cmaes needs at least two settings that are numbers and searched without `when`"
        problems.add(("sampler",), f"{problem}; here there is {found}", "use tpe or gp")
    if objectives is not None and len(objectives) > 1 and budget.target is not None:
        problems.add(("budget", "target"), "needs a single objective, and this sweep has several", "leave it out")
    if objectives is not None and len(objectives) > 1 and isinstance(sampler, CmaEsSampler | StagedSampler):
        problem = f"sampler {sampler.kind} needs a single objective, and this sweep has {len(objectives)}"
        problems.add(("sampler",), problem, "use nsgaii, tpe or gp")


def _numeric_paths(search: SearchSpace) -> list[str]:
    """Return the settings that CMA-ES can search."""
    return [
        path for path, dimension in search.dimensions.items() if not dimension.when and is_numeric_dimension(dimension)
    ]


def check_pruner(
    problems: ErrorCollector,
    pruner: Pruner,
    search: SearchSpace,
    objectives: tuple[Objective, ...],
    base: TrialConfig | None,
) -> None:
    """Report a pruner whose metric is not held-out, not measured during training, or scaled by a searched setting."""
    if isinstance(pruner, NoPruner | WilcoxonPruner):
        return
    if isinstance(pruner, PatientPruner) and pruner.wrapped is not None:
        if isinstance(pruner.wrapped, WilcoxonPruner):
            problems.add(("pruner", "wrapped"), "wilcoxon compares pair by pair and cannot be wrapped")
        elif pruner.wrapped.metric is not None:
            problem = "a wrapped pruner uses the same metric; name it once, as pruner.metric"
            problems.add(("pruner", "wrapped", "metric"), problem)
    if pruner.metric is None and len(objectives) > 1:
        named = " or ".join(objective.metric for objective in objectives)
        problems.add(("pruner",), "the sweep has several objectives: name the metric to compare", f"metric: {named}")
        return
    objective = pruning_metric(pruner, objectives)
    if objective is None:
        problems.add(("pruner", "metric"), f"{pruner.metric} is neither better when high nor when low")
        return
    late = None if base is None else unmeasured_reason(objective.metric, base.evaluation)
    problem = _objective_problem(objective.metric, objective.direction, search.paths, base) or late
    if problem is not None and (pruner.metric is not None or late):
        problems.add(("pruner", "metric") if pruner.metric is not None else ("pruner",), *problem)


def check_repeats(problems: ErrorCollector, given: Any, search: SearchSpace) -> None:
    """Report `repeats` in a sweep that also searches the seed, so that each trial has two."""
    if isinstance(given, int) and given > 1 and SEED in search.paths:
        problem = f"each configuration gets {given} seeds, and search has {SEED} too"
        problems.add(("repeats",), problem, f"remove one: repeat k has base.{SEED} + k")


def settle_confirm_share(tree: dict[str, Any]) -> None:
    """Set `base.data.confirm_share` of a new sweep with finalists, in place, where the file does not say it."""
    base = tree.get("base")
    data = cast(dict[str, Any], base).get("data") if isinstance(base, dict) else None
    if isinstance(data, dict) and data.get("confirm_share") is None:  # pyright: ignore[reportUnknownMemberType]
        data["confirm_share"] = CONFIRM_SHARE


def check_eval_on(problems: ErrorCollector, base: TrialConfig) -> None:
    """Report a search that evaluates on the rows that are kept for finalists."""
    if base.data.eval_on == "confirm":
        problem = "the search would evaluate on the held-out rows that are kept for finalists"
        problems.add(("base", "data", "eval_on"), problem, "leave it out")


def check_judge(problems: ErrorCollector, judge: JudgeConfig, base: TrialConfig) -> None:
    """Report a judge whose only voter is the checker of known answers where no held-out row has one."""
    if judge.only_checker and judge.prompts_from is None and not eval_rows_have_answers(base.data):
        hint = "set judge.reward_model or judge.endpoint, or name the column: {path: FILE, columns: {answer: COLUMN}}"
        problems.add(("judge",), "the held-out rows have no `answer` for the checker, the only judge", hint)


def check_warm_start(problems: ErrorCollector, given: Any, sampler: Sampler) -> None:
    """Report an invalid `warm_start`, or one with a sampler that does not learn from results."""
    if given is None:
        return
    if not isinstance(given, str) or not SWEEP_NAME_PATTERN.fullmatch(given):
        problems.add(("warm_start",), f"must be the name of a finished sweep, not {describe_value(given)}")
    elif not isinstance(sampler, AdaptiveSampler):
        learners = ", ".join(kind for kind, model in SAMPLERS.items() if issubclass(model, AdaptiveSampler))
        problems.add(("warm_start",), f"sampler {sampler.kind} does not learn from results", f"use one of {learners}")


_DIRECTIONS: tuple[Literal["maximize", "minimize"], ...] = ("maximize", "minimize")


def load_objectives(
    problems: ErrorCollector, tree: dict[str, Any], search: SearchSpace | None, base: TrialConfig | None
) -> tuple[Objective, ...] | None:
    """Load `maximize` and `minimize`, those to maximize first; by default the comparison metric. None if invalid."""
    searched = search.paths if search is not None else _searched_paths(tree)
    for path in check_fixed_evaluation(searched):
        problem = f"{path} changes the held-out pairs or their evaluation, so trials that differ in it cannot be ranked"
        where = location_of(search.zipped if search is not None else (), path)
        problems.add(where, problem, "give it one value in base, and make a sweep for each other value")
    objectives: list[Objective] = []
    before = len(problems.items)
    for direction in _DIRECTIONS:
        given = tree.get(direction)
        listed: tuple[Any, ...] = () if given is None else (given,)
        if isinstance(given, tuple):
            listed = cast(tuple[Any, ...], given)
        if isinstance(given, tuple) and not listed:
            problems.add((direction,), "the list is empty")
        for index, metric in enumerate(listed):
            loc: Location = (direction, index) if isinstance(given, tuple) else (direction,)
            if not isinstance(metric, str):
                problems.add(loc, f"must be the name of a metric, not {describe_value(metric)}")
            elif any(objective.metric == metric for objective in objectives):
                problems.add(loc, f"{metric} is an objective already")
            elif (
                problem := _objective_problem(metric, direction, searched, base)
                or _unreported_by_kinds(metric, search, base)
            ) is not None:
                problems.add(loc, *problem)
            else:
                objectives.append(Objective(metric=metric, direction=direction))
    if len(problems.items) > before:
        return None
    if objectives:
        return tuple(objectives)
    problem = _objective_problem(COMPARISON_METRIC, "maximize", searched, base)
    if problem is not None:
        problems.add(("maximize",), *problem)
        return None
    return (Objective(metric=COMPARISON_METRIC, direction="maximize"),)


def load_requirements(
    problems: ErrorCollector, tree: dict[str, Any], search: SearchSpace | None, base: TrialConfig | None
) -> tuple[Requirement, ...] | None:
    """Load `require`, a mapping of metrics to a bound or to a list of bounds; None if it is invalid.

    Default bounds of metrics that it does not name are added to a new sweep's.
    """
    given = tree.get("require")
    if _is_off(given) or given == "none":
        return ()
    defaults = default_requirements(base) if problems.is_new and base is not None else ()
    if given is None:
        return defaults
    if not isinstance(given, dict):
        problem = f"must be a mapping of metrics to bounds, not {describe_value(given)}"
        problems.add(("require",), problem, f'write require: {{{EXACT_ANSWERS}: ">= initial"}}')
        return None
    searched = search.paths if search is not None else _searched_paths(tree)
    before = len(problems.items)
    found: list[Requirement] = []
    for metric, value in cast(dict[str, Any], given).items():
        problem = check_required_metric(metric, searched)
        if not _is_off(value):
            problem = problem or _unmeasured(metric, base) or _unreported_by_kinds(metric, search, base)
        if problem is not None:
            problems.add(("require", metric), *problem)
            continue
        if _is_off(value):
            continue
        listed = cast(tuple[Any, ...], value) if isinstance(value, tuple) else (value,)
        if not listed:
            problems.add(("require", metric), "the list is empty", f"write {RIGHT_FORM}")
        for index, bound in enumerate(listed):
            loc: Location = ("require", metric, index) if isinstance(value, tuple) else ("require", metric)
            try:
                requirement = Requirement.parse(metric, bound if isinstance(bound, str) else "")
            except ValueError:
                problem = f"must be >= or <= and a number or initial, not {describe_value(bound)}"
                problems.add(loc, problem, f"write {_bound_form(metric, bound)}")
                continue
            if requirement in found:
                problems.add(loc, f"{requirement.name} is required twice")
            else:
                found.append(requirement)
    if len(problems.items) > before:
        return None
    return (*found, *(default for default in defaults if default.metric not in given))


def _is_off(value: Any) -> bool:
    return value is False or value == OFF


def _bound_form(metric: str, given: Any) -> str:
    """Return the bound that is meant: one without a comparison is the least of a metric that is better when high."""
    known = lookup(metric)
    comparison = "<=" if known is not None and known.better == "minimize" else ">="
    text = str(given).strip()
    if text[:1] in ("<", ">", "="):
        comparison = {"<": "<=", ">": ">="}.get(text[0], comparison)
        text = text.lstrip("<>= ")
    meant = f"{comparison} {text}"
    try:
        Requirement.parse(metric, meant)
    except ValueError:
        return RIGHT_FORM
    return f'"{meant}"'


def _objective_problem(
    metric: str, direction: str, searched: Sequence[str], base: TrialConfig | None
) -> tuple[str, str] | None:
    return check_metric(metric, direction, searched) or _unmeasured(metric, base)


def _unmeasured(metric: str, base: TrialConfig | None) -> tuple[str, str] | None:
    problem = None
    if base is not None:
        problem = check_completion_metric(metric, base.evaluation)
        if problem is None and requires_answers(metric) and not eval_rows_have_answers(base.data):
            problem = ("the held-out rows have no correct answer", "give their column as columns: {answer: COLUMN}")
    return problem


def _unreported_by_kinds(metric: str, search: SearchSpace | None, base: TrialConfig | None) -> tuple[str, str] | None:
    if base is None or search is None:
        return None
    return check_kind(metric, search.choices(LOSS_KIND) or (base.loss.kind,))


def _searched_paths(tree: dict[str, Any]) -> list[str]:
    given = tree.get("search")
    return [str(path) for path in cast(dict[str, Any], given)] if isinstance(given, dict) else []
