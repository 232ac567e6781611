"""A sweep's file into a SweepSpec: every error at once, each with its line; nothing else happens.

The keys of the file into the parts of a SweepSpec; what is wrong with one part hides nothing of another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import BaseModel

from orchestrator.errors import Finding, SpecError, nearest
from orchestrator.folders import NAME
from orchestrator.spec.estimates.cost_estimate import why_apart
from orchestrator.spec.guard_config import GuardConfig
from orchestrator.spec.judge_config import JudgeConfig
from orchestrator.spec.loading.method_sections import (
    build_goals,
    build_order,
    build_pruner,
    build_sampler,
    check_pruner,
    check_sampler,
    check_warm_start,
)
from orchestrator.spec.loading.overrides import override
from orchestrator.spec.loading.search_section import build_enqueue, build_search, loc_of
from orchestrator.spec.loading.shorthands import expand, find_files
from orchestrator.spec.loading.validation_errors import SOURCES, Findings, show
from orchestrator.spec.loading.yaml_document import Document, Loc, parse, read_document
from orchestrator.spec.search import corners
from orchestrator.spec.search.dimensions import Scalar
from orchestrator.spec.search.space import SearchSpace
from orchestrator.spec.sweep_spec import DOOR, Budget, Notify, Resources, SftStage, SweepSpec, Tracking
from trainer.config.trial import TrialConfig

M = TypeVar("M", bound=BaseModel)

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
    goals = build_goals(findings, tree, search, base)
    sampler = build_sampler(findings, tree.get("sampler"))
    if search is not None and sampler is not None and budget is not None:
        check_sampler(findings, sampler, search, budget, goals)
    pruner = build_pruner(findings, tree.get("pruner"))
    if pruner is not None and search is not None and goals is not None:
        check_pruner(findings, pruner, search, goals)
    enqueue = None
    if base is not None and search is not None and goals is not None:
        enqueue = build_enqueue(findings, tree.get("enqueue"), search, base, goals)
    resources = _section(findings, Resources, tree, "resources")
    if resources is not None and base is not None and search is not None:
        _check_sharing(findings, resources, base, search, enqueue or ())
    if sampler is not None:
        check_warm_start(findings, tree.get("warm_start"), sampler)
    parts = {
        "name": _name(findings, tree),
        "base": base,
        "search": search,
        "sampler": sampler,
        "enqueue": enqueue,
        "order": build_order(findings, tree.get("order")),
        "goal": goals[0] if goals else None,
        "also": goals[1:] if goals else None,
        "pruner": pruner,
        "guard": _section(findings, GuardConfig, tree, "guard"),
        "budget": budget,
        "resources": resources,
        "tracking": _section(findings, Tracking, tree, "tracking"),
        "notify": _section(findings, Notify, tree, "notify") if tree.get("notify") is not None else None,
        "judge": _section(findings, JudgeConfig, tree, "judge") if tree.get("judge") is not None else None,
        "sft": _sft(findings, tree.get("sft")),
    } | {key: tree[key] for key in ("description", "keep_models", "storage", "mirror", "warm_start") if key in tree}
    built = {key: part for key, part in parts.items() if part is not None}
    spec = findings.build(SweepSpec, built, (), said=frozenset(parts.keys() - built.keys()))
    return None if findings.items else spec


def _section(findings: Findings, model: type[M], tree: dict[str, Any], key: str) -> M | None:
    given = tree.get(key)
    return findings.build(model, {} if given is None else given, (key,))


def _check_sharing(
    findings: Findings,
    resources: Resources,
    base: TrialConfig,
    search: SearchSpace,
    enqueue: tuple[dict[str, Scalar], ...],
) -> None:
    asked = resources.trials_per_process
    if asked != "auto" and asked > 1:
        for path, why in why_apart(base, search, enqueue):
            problem = f"{asked} trials cannot train over one frozen model: {path}: {why}"
            findings.add(("resources", "trials_per_process"), problem, "write 1 or auto")


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


def _list(given: Any) -> tuple[Any, ...]:
    return cast(tuple[Any, ...], given) if isinstance(given, tuple) else ()


@dataclass(frozen=True, slots=True)
class Loaded:
    """A sweep, and what the person should know about how its file was read."""

    spec: SweepSpec
    notices: tuple[str, ...]
    document: Document
    """The file, for findings that are made later."""


def load(path: Path, sets: Sequence[str] = (), *, name: str | None = None) -> SweepSpec:
    """The sweep in this file, with `--set` overrides and another name if given; SpecError with every finding."""
    return read(path, sets, name=name).spec


def read(path: Path, sets: Sequence[str] = (), *, name: str | None = None) -> Loaded:
    """Like `load`, with the notices."""
    return _read(read_document(path), path.resolve().parent, sets, name)


def loads(text: str, folder: Path, sets: Sequence[str] = (), *, source: str = "sweep.yaml") -> SweepSpec:
    """Like `load`, from text; files it names are looked for in `folder` first."""
    return _read(parse(text, source), folder, sets, None).spec


def _read(document: Document, folder: Path, sets: Sequence[str], name: str | None) -> Loaded:
    findings = Findings(document)
    if not isinstance(document.value, dict):
        findings.add((), f"a sweep is a mapping with the keys {', '.join(DOOR)}; this is {show(document.value)}")
        raise SpecError(findings.items)
    tree = cast(dict[str, Any], document.value)
    expand(tree)
    notices = override(document, sets, findings.items)
    if name is not None:
        tree["name"] = name
        document.lines["name",] = f"--name {name}"
    expand(tree)
    find_files(findings, tree, folder)
    spec = build(findings, tree)
    if spec is None:
        raise SpecError(sorted(findings.items, key=_place))
    return Loaded(spec, tuple(notices), document)


def _place(finding: Finding) -> tuple[str, int]:
    source, _, line = finding.where.rpartition(":")
    return (source, int(line)) if line.isdigit() else (finding.where, 0)
