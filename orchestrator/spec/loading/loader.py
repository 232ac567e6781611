"""`load_spec`: loads a sweep file as a SweepSpec; reports all errors at once, each with its line.

Each section is loaded on its own, so that an error in one does not hide errors in another.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import BaseModel

from orchestrator.errors import SpecError, SpecProblem, closest_match
from orchestrator.folders import RESERVED_NAMES, SWEEP_NAME_PATTERN
from orchestrator.spec.estimates.cost_estimate import cannot_share_base
from orchestrator.spec.guard_config import GuardConfig
from orchestrator.spec.judge_config import JudgeConfig
from orchestrator.spec.loading.file_rights import FileRights, check_names
from orchestrator.spec.loading.method_sections import (
    check_eval_on,
    check_judge,
    check_pruner,
    check_repeats,
    check_sampler,
    check_warm_start,
    load_objectives,
    load_order,
    load_pruner,
    load_requirements,
    load_sampler,
    settle_confirm_share,
    settle_grid_order,
)
from orchestrator.spec.loading.overrides import apply_overrides
from orchestrator.spec.loading.right_forms import explain, flow, loss_form, option_form
from orchestrator.spec.loading.search_section import check_values, load_enqueue, load_search, location_of
from orchestrator.spec.loading.shorthands import expand_shorthands, resolve_paths, take_auto
from orchestrator.spec.loading.validation_errors import (
    NONE_PROBLEM,
    SOURCE_MODELS,
    UNKNOWN_KEY,
    ErrorCollector,
    describe_value,
    parse_document,
    read_document,
)
from orchestrator.spec.loading.variables import expand_variables, keep_variables
from orchestrator.spec.pruners import PRUNED_FROM, NoPruner
from orchestrator.spec.search import corners
from orchestrator.spec.search.dimensions import Scalar
from orchestrator.spec.search.space import SearchSpace
from orchestrator.spec.search.trial_params import LOSS_KIND, list_settings
from orchestrator.spec.sweep_spec import (
    MODEL_SOURCES,
    SECTION_ORDER,
    SFT_WITH_SEARCHED_MODEL,
    Budget,
    Finalists,
    Notify,
    Resources,
    SftStage,
    SweepSpec,
    Tracking,
)
from trainer.config.loss_aliases import alias_hint
from trainer.config.trial import TrialConfig
from trainer.config.yaml_files import Document, Location

M = TypeVar("M", bound=BaseModel)

_EXTENSION = "x-"
"""Beginning of top-level keys that hold shared anchors and are no part of the sweep, as in Compose files."""
SOURCE_KEYS = tuple(SOURCE_MODELS.values())


def load_sections(problems: ErrorCollector, tree: dict[str, Any]) -> SweepSpec | None:
    """Return the sweep; None if there are errors, which are added to `findings`."""
    for key in tree:
        if key not in SECTION_ORDER:
            problems.unknown_key((key,), list(SECTION_ORDER))
    tree, auto = take_auto(problems, tree)
    if problems.is_new and tree.get("finalists") is not None:
        settle_confirm_share(tree)
    base = _load_base(problems, tree)
    if base is not None:
        check_eval_on(problems, base)
    search = load_search(problems, tree.get("search"))
    if base is not None and search is not None:
        search = _check_corners(problems, search, base)
    else:
        check_values(problems, tree.get("search"))
    budget = _load_section(problems, Budget, tree, "budget")
    objectives = load_objectives(problems, tree, search, base)
    sampler = load_sampler(problems, tree.get("sampler"))
    if search is not None and sampler is not None and budget is not None:
        check_sampler(problems, sampler, search, budget, objectives)
    pruner = load_pruner(problems, tree.get("pruner"))
    if pruner is not None and search is not None and objectives is not None:
        check_pruner(problems, pruner, search, objectives, base)
    enqueue = None
    if base is not None and search is not None and objectives is not None:
        enqueue = load_enqueue(problems, tree.get("enqueue"), search, base, objectives)
    if problems.is_new and sampler is not None and base is not None and search is not None and budget is not None:
        repeats = cast(Any, tree.get("repeats"))
        repeats = repeats if isinstance(repeats, int) and repeats > 0 else 1
        sampler = settle_grid_order(sampler, tree.get("sampler"), search, base, budget, enqueue or (), repeats)
    resources = _load_section(problems, Resources, tree, "resources")
    if resources is not None and base is not None and search is not None:
        _check_sharing(problems, resources, base, search, enqueue or ())
    if search is not None:
        check_repeats(problems, tree.get("repeats"), search)
    if sampler is not None:
        check_warm_start(problems, tree.get("warm_start"), sampler)
    judge = _load_section(problems, JudgeConfig, tree, "judge") if tree.get("judge") is not None else None
    if problems.is_new and judge is not None and base is not None:
        check_judge(problems, judge, base)
    finalists = None
    if tree.get("finalists") is not None:
        finalists = _load_section(problems, Finalists, tree, "finalists")
    parts = {
        "name": _load_name(problems, tree),
        "auto": auto,
        "base": base,
        "search": search,
        "sampler": sampler,
        "enqueue": enqueue,
        "order": load_order(problems, tree.get("order")),
        "goal": objectives[0] if objectives else None,
        "also": objectives[1:] if objectives else None,
        "require": load_requirements(problems, tree, search, base),
        "pruner": pruner,
        "guard": _load_section(problems, GuardConfig, tree, "guard"),
        "finalists": finalists,
        "budget": budget,
        "resources": resources,
        "tracking": _load_section(problems, Tracking, tree, "tracking"),
        "notify": _load_section(problems, Notify, tree, "notify") if tree.get("notify") is not None else None,
        "judge": judge,
        "sft": _load_sft(problems, tree.get("sft"), search),
    } | {
        key: tree[key]
        for key in ("description", "repeats", "keep_models", "storage", "mirror", "warm_start")
        if key in tree
    }
    built = {key: part for key, part in parts.items() if part is not None}
    spec = problems.validate(SweepSpec, built, (), already_reported=frozenset(parts.keys() - built.keys()))
    return None if problems.items else spec


def _load_section(problems: ErrorCollector, model: type[M], tree: dict[str, Any], key: str) -> M | None:
    given = tree.get(key)
    return problems.validate(model, {} if given is None else given, (key,))


def _check_sharing(
    problems: ErrorCollector,
    resources: Resources,
    base: TrialConfig,
    search: SearchSpace,
    enqueue: tuple[dict[str, Scalar], ...],
) -> None:
    requested = resources.trials_per_process
    if requested != "auto" and requested > 1:
        for path, reason in cannot_share_base(base, search, enqueue):
            problem = f"{requested} trials cannot train over one frozen model: {path}: {reason}"
            problems.add(("resources", "trials_per_process"), problem, "write 1 or auto")


def _load_name(problems: ErrorCollector, tree: dict[str, Any]) -> str | None:
    name = tree.get("name")
    if name is None:
        problems.add(("name",), "is required", "it names the sweep's folder and its run in MLflow")
    elif not isinstance(name, str):
        problems.add(("name",), f"must be text, not {describe_value(name)}", f'quote it: "{name}"')
    elif not SWEEP_NAME_PATTERN.fullmatch(name):
        problems.add(
            ("name",), f"{describe_value(name)} must be 1 to 64 letters, digits, . _ or -, the first a letter or digit"
        )
    elif name.lower() in RESERVED_NAMES and problems.is_new:
        problems.add(
            ("name",), f"{describe_value(name)} is a name that the runs folder uses itself", "use another name"
        )
    else:
        return name
    return None


def _load_base(problems: ErrorCollector, tree: dict[str, Any]) -> TrialConfig | None:
    if tree.get("base") is None:
        problems.add(("base",), "is required", "one complete trial: model, data, loss, training")
        return None
    wrong = _check_sources(problems, tree["base"], ("base",))
    return problems.validate(TrialConfig, tree["base"], ("base",), invalid=wrong)


def _load_sft(problems: ErrorCollector, given: Any, search: SearchSpace | None) -> SftStage | None:
    if given is None:
        return None
    if problems.is_new and search is not None:
        for path in (path for path in search.paths if path.startswith(MODEL_SOURCES)):
            hint = "remove it from search, or remove sft"
            problems.add(location_of(search.zipped, path), SFT_WITH_SEARCHED_MODEL, hint)
    return problems.validate(SftStage, given, ("sft",), invalid=_check_sources(problems, given, ("sft",)))


def _check_sources(problems: ErrorCollector, tree: Any, loc: Location) -> frozenset[Location]:
    """Report sources that have no key or several keys of a kind of source; return their locations."""
    wrong: set[Location] = set()
    data = cast(dict[str, Any], tree).get("data") if isinstance(tree, dict) else None
    for split in ("train", "eval"):
        sources = cast(dict[str, Any], data).get(split) if isinstance(data, dict) else None
        for index, source in enumerate(_as_list(sources)):
            inner: Location = ("data", split, index)
            keys = list(cast(dict[str, Any], source)) if isinstance(source, dict) else list[str]()
            known = [key for key in SOURCE_KEYS if key in keys]
            if len(known) != 1:
                near = next((n for key in keys if (n := closest_match(key, SOURCE_KEYS))), None)
                has = ", ".join(known or keys) or describe_value(source)
                problem = f"needs exactly one of {', '.join(SOURCE_KEYS)}; it has {has}"
                problems.add((*loc, *inner), problem, f"did you mean {near}?" if near and not known else "")
                wrong.add(inner)
    return frozenset(wrong)


def _check_corners(problems: ErrorCollector, search: SearchSpace, base: TrialConfig) -> SearchSpace | None:
    """Return the search with typed values (2 becomes 2.0); None if a corner is invalid, which is reported."""
    found = corners.find_corner_problems(search, base, is_new=problems.is_new)
    for problem in found:
        loc = _value_location(problems, search, problem)
        hint = problem.hint
        if problem.path == LOSS_KIND and (form := loss_form(problem.value)):
            hint = f"{form} under base, or search loss.loss_type"
        elif problem.path in list_settings() and isinstance(problem.value, str):
            values = [value for value in search.listed_values(problem.path) if isinstance(value, str)]
            hint = f"for lists write [[{', '.join(values)}]]" if not problem.value.startswith("[") else hint
        elif problem.path.startswith("loss."):
            hint = alias_hint(problem.path.removeprefix("loss."), base.loss.kind) or hint
        problems.add(loc, problem.problem, hint)
    return None if found else corners.with_typed_values(search, base)


def _value_location(problems: ErrorCollector, search: SearchSpace, problem: corners.CornerProblem) -> Location:
    loc = location_of(search.zipped, problem.path)
    for index, value in enumerate(search.listed_values(problem.path)):
        if type(value) is type(problem.value) and value == problem.value:
            written = [
                (*loc, index),
                *((*loc, kind, index) for kind in ("choice", "uniform", "log_uniform", "int_uniform")),
            ]
            return next((w for w in written if w in problems.document.lines), loc)
    return loc


def _as_list(given: Any) -> tuple[Any, ...]:
    return cast(tuple[Any, ...], given) if isinstance(given, tuple) else ()


@dataclass(frozen=True, slots=True)
class LoadedSpec:
    """A sweep, and notices about how its file was read."""

    spec: SweepSpec
    notices: tuple[str, ...]
    document: Document
    """The parsed file, for the line numbers of later findings."""


def load_spec(path: Path, overrides: Sequence[str] = (), *, name: str | None = None, is_new: bool = True) -> SweepSpec:
    """Load a sweep file with `overrides` (`--set`) and another name. Raises SpecError with all findings.

    `is_new=False`: the file of a stored sweep, in which values that are no longer allowed are accepted, and names of
    files that are gone.
    """
    rights = FileRights.of_command(path.resolve().parent)
    return _load_document(read_document(path), rights, overrides, name, is_new).spec


def load_with_notices(path: Path, overrides: Sequence[str] = (), *, name: str | None = None) -> LoadedSpec:
    """Load a sweep file as `load_spec` does; return notices and the parsed file too."""
    rights = FileRights.of_command(path.resolve().parent)
    return _load_document(read_document(path), rights, overrides, name, is_new=True)


def load_spec_text(
    text: str, folder: Path, overrides: Sequence[str] = (), *, source: str = "sweep.yaml", is_new: bool = True
) -> SweepSpec:
    """Load a sweep from text as `load_spec` does; relative file names are resolved from `folder` first."""
    return _load_document(parse_document(text, source), FileRights.of_command(folder), overrides, None, is_new).spec


def load_text_with_notices(
    text: str, rights: FileRights, overrides: Sequence[str] = (), *, source: str = "sweep.yaml", name: str | None = None
) -> LoadedSpec:
    """Load a new sweep from text as `load_with_notices` does, with names that `rights` allow. Raises SpecError."""
    loaded = _load_document(parse_document(text, source), rights, overrides, name, is_new=True)
    if rights.is_closed:
        check_names(loaded.spec, rights, loaded.document)
    return loaded


def load_document(document: Document, folder: Path) -> SweepSpec:
    """Load a stored sweep from a parsed document; relative file names are resolved from `folder` first."""
    return _load_document(document, FileRights.of_command(folder), (), None, is_new=False).spec


def _load_document(
    document: Document, rights: FileRights, overrides: Sequence[str], name: str | None, is_new: bool
) -> LoadedSpec:
    problems = ErrorCollector(document, is_new=is_new, explain=functools.partial(_explain, document))
    if not isinstance(document.value, dict):
        problems.add(
            (),
            f"a sweep is a mapping with the keys {', '.join(SECTION_ORDER)}; this is {describe_value(document.value)}",
        )
        raise SpecError(problems.items)
    tree = cast(dict[str, Any], document.value)
    expand_shorthands(document)
    notices = apply_overrides(document, overrides, problems.items)
    for key in [key for key in tree if key.startswith(_EXTENSION)]:
        del tree[key]
    if is_new:
        notices += expand_variables(problems, tree, rights.environment)
    else:
        keep_variables(tree)
    if name is not None:
        tree["name"] = name
        document.lines["name",] = f"--name {name}"
    rights.remove_forbidden(problems, tree)
    notices += resolve_paths(problems, tree, rights)
    spec = load_sections(problems, tree)
    if is_new:
        _check_none(problems)
    if spec is None or problems.items:
        raise SpecError(sorted(problems.items, key=_line_of))
    if is_new and tree.get("pruner") is None:
        spec = spec.model_copy(update={"pruner": spec.default_pruner})
        if spec.pruner != NoPruner():
            notices.append(
                f"pruner: {spec.pruner.kind}, the default from {PRUNED_FROM} trials on, stops a trial that is worse "
                "than the median of the others; with `pruner: none` all train to their end"
            )
    return LoadedSpec(spec, _merged(notices), document)


def _merged(notices: Sequence[str]) -> tuple[str, ...]:
    """Return the notices, of which those that say the same of several settings become one."""
    paths: dict[str, list[str]] = {}
    for notice in dict.fromkeys(notices):
        path, colon, text = notice.partition(": ")
        is_setting = bool(colon) and " " not in path
        paths.setdefault(text if is_setting else notice, []).append(path if is_setting else "")
    return tuple(f"{', '.join(listed)}: {text}" if listed[0] else text for text, listed in paths.items())


def _explain(document: Document, problem: str, loc: Location, value: Any) -> str:
    if problem == UNKNOWN_KEY and document.location(loc).startswith("--set "):
        return option_form(".".join(map(str, loc)).removeprefix("base."), flow(value))
    return explain(problem, loc, value)


def _check_none(problems: ErrorCollector) -> None:
    """Report the word None where a setting would take it as text."""
    document = problems.document
    reported = {finding.path for finding in problems.items}
    for loc in document.unquoted_none:
        path = ".".join(map(str, loc))
        from_file = document.lines.get(loc, "--").startswith(document.source)
        if (
            not from_file
            or str(loc[0]).startswith(_EXTENSION)
            or any(f"{each}.".startswith(f"{path}.") for each in reported)
        ):
            continue
        problems.add(loc, NONE_PROBLEM, "write null, or 'None' in quotes for the text")


def _line_of(finding: SpecProblem) -> tuple[str, int]:
    source, _, line = finding.where.rpartition(":")
    return (source, int(line)) if line.isdigit() else (finding.where, 0)
