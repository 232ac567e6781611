"""`orchestrate set`: changes the budget of a sweep while its driver runs, or for its next one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from orchestrator import folders
from orchestrator.commands.request_commands import current_user, open_study, when_applied
from orchestrator.errors import SpecError, SpecProblem, closest_match
from orchestrator.folders import SweepFolder, existing_sweep
from orchestrator.spec.loading.loader import load_spec_text
from orchestrator.spec.loading.serialization import dump_spec
from orchestrator.spec.sweep_spec import SweepSpec
from orchestrator.study import budget_changes
from orchestrator.study.budget_changes import SETTABLE
from orchestrator.study.reader import StudyReader
from orchestrator.study.trial_records import REQUESTED_EVENT, RequestKind


def set_budget(name: str, root: Path, settings: Sequence[str]) -> list[str]:
    """Request changes of the budget, as PATH=VALUE; return notices about their effect.

    Raises:
        SpecError: a setting is not one of the budget, or its value is invalid.
        BudgetUsedUp, TooManySlots: a limit is used up already, or the visibility rule forbids it.
    """
    folder = existing_sweep(root, name)
    with open_study(folder) as study:
        before = budget_changes.with_requests(study.spec, study.requests())
        after = _with_settings(before, folder.path, settings)
        budget_changes.check_not_used_up(before, after, study.snapshots(), study.usage())
        if after.budget.concurrency is not None and after.budget.concurrency != before.budget.concurrency:
            study.terms.check_concurrency(after, after.budget.concurrency)
        if after == before:
            return [f"{name} has {', '.join(settings)} already: nothing changes"]
        text = budget_changes.request_text(before.budget, after.budget, f"by {current_user()}")
        study.add_request(RequestKind.SET, text)
        study.add_event(REQUESTED_EVENT, f"{RequestKind.SET}: {text}")
    has_driver = folders.driver_of(folder) is not None
    effect = ": its driver takes it over" if has_driver else ""
    return [f"requested {text.partition(' (')[0]} of {name}{effect}", *when_applied(name, has_driver)]


def is_budget_waiting(folder: SweepFolder) -> bool:
    """Return whether the next driver of a sweep takes over another budget, with which a finished one may continue."""
    if not StudyReader.exists(folder):
        return False
    with StudyReader.open(folder, read_only=True) as study:
        return any(request.kind == RequestKind.SET for request in study.requests())


def _with_settings(spec: SweepSpec, folder: Path, settings: Sequence[str]) -> SweepSpec:
    problems: list[SpecProblem] = []
    for one in settings:
        path = one.partition("=")[0].strip()
        if path not in SETTABLE:
            near = closest_match(path, SETTABLE) or next((s for s in SETTABLE if s.endswith(f".{path}")), None)
            problem = f"cannot be set while a sweep runs; what can: {', '.join(SETTABLE)}"
            hint = f"did you mean {near}?" if near else f"stop it, then orchestrate resume {spec.name} --set {one}"
            problems.append(SpecProblem(one, path, problem, hint))
    if problems:
        raise SpecError(problems)
    try:
        return load_spec_text(dump_spec(spec), folder, settings, is_new=False)
    except SpecError as error:
        raise SpecError([replace(f, where=f.where.removeprefix("--set ")) for f in error.problems]) from None
