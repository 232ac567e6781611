"""What a page's buttons do: each action with the page that confirms it, what it costs, and what takes it back.

An action calls the function of the API that does it, with the rights that the API demands.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any
from urllib.parse import urlencode

from fastapi import HTTPException

from orchestrator.commands.budget_control import is_budget_waiting
from orchestrator.commands.runs_folder.sweep_deletion import plan_deletion
from orchestrator.commands.runs_folder.sweep_list import ARCHIVED
from orchestrator.folders import SweepFolder
from orchestrator.service.access_tokens import Person
from orchestrator.service.page.action_subjects import Subject
from orchestrator.service.page.api_calls import ApiCalls
from orchestrator.service.page.sweep_views import shown_state
from orchestrator.study.budget_changes import SETTABLE
from orchestrator.study.trial_records import TrialState


@dataclass(frozen=True, slots=True)
class Field:
    """A field of an action's form. `kind`: text, number, lines or check."""

    name: str
    label: str
    kind: str = "text"
    about: str = ""
    value: Callable[[Subject], str] = lambda _: ""
    required: bool = False


@dataclass(frozen=True, slots=True)
class Action:
    """One button and the page that confirms it."""

    key: str
    label: str
    applies: Callable[[Subject], bool]
    costs: Callable[[Subject], Sequence[str]]
    """What it does and costs, as sentences."""
    path: str
    """Of the API's route."""
    values: Callable[[Mapping[str, str]], dict[str, Any]] = lambda given: {"body": {"why": given.get("why", "")[:500]}}
    """Parameters of the route, from the form."""
    fields: tuple[Field, ...] = ()
    undo: Callable[[Subject], tuple[str, str]] | None = None
    """Label and URL of what takes it back, from the subject as it was before; None: nothing does."""
    method: str = "POST"
    is_final: bool = False
    """Whether it cannot be taken back."""
    leads_to: str = ""
    """Page that is shown after it; "": the subject's."""

    def run(self, api: ApiCalls, subject: Subject, person: Person, given: Mapping[str, str]) -> Sequence[str]:
        """Do it for a person with the values of the form; return notices."""
        where: dict[str, Any] = {"name": subject.name}
        if subject.trial is not None:
            given = {**given, "trial": str(subject.trial.number)}
            where |= {"trial": subject.trial.number} if "{trial}" in self.path else {}
        answer = api.call(person, self.method, self.path, **where, **self.values(given))
        return answer.get("notices") or [f"done: {self.label.lower()}"]


_WHY = Field("why", "Reason, for the history", about="optional")


def _to(label: str, key: str, **values: str) -> Callable[[Subject], tuple[str, str]]:
    def undo(subject: Subject) -> tuple[str, str]:
        query = f"?{urlencode(values)}" if values else ""
        return label, f"{subject.url}/actions/{key}{query}"

    return undo


def _settings(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def _budget_now(subject: Subject) -> str:
    if subject.frame is None:
        return ""
    budget = subject.frame.spec.budget.model_dump(mode="json")
    return "\n".join(f"{path}={json.dumps(budget[path.partition('.')[2]])}" for path in SETTABLE)


def _budget_undo(subject: Subject) -> tuple[str, str]:
    return "set the budget back", f"{subject.url}/actions/budget?" + urlencode({"settings": _budget_now(subject)})


def _trial_settings(given: Mapping[str, str], check: str) -> dict[str, Any]:
    return {"body": {"overrides": _settings(given.get("settings", "")), check: bool(given.get(check))}}


def _judging(given: Mapping[str, str]) -> dict[str, Any]:
    counts = {name: given[name] for name in ("top", "prompts", "samples") if given.get(name, "").strip()}
    return {"body": {**counts, "confirm_cost": bool(given.get("confirm_cost"))}}


def _open_trial(subject: Subject, *states: TrialState) -> bool:
    return subject.trial is not None and subject.trial.record.state in states


def _is_sweep(subject: Subject) -> bool:
    return subject.trial is None and subject.state != ARCHIVED


def _has_ended(subject: Subject) -> bool:
    """Whether no driver runs it and the service will start none."""
    is_queued = subject.queued is not None and not subject.queued.state.has_ended
    return _is_sweep(subject) and not subject.is_driven and not is_queued and not subject.is_judged


def _is_resumable(subject: Subject) -> bool:
    """Whether a driver would have something to do."""
    if subject.state == "finished":
        return is_budget_waiting(SweepFolder(subject.context.root, subject.name))
    return subject.state not in ("abandoned", "unreadable")


_SETTINGS_LINES = Field("settings", "Settings, one a line", "lines", "for example loss.beta=3.0", required=True)

ACTIONS: tuple[Action, ...] = (
    Action(
        "pause",
        "Pause",
        lambda s: _is_sweep(s) and s.state in ("running", "paused") and not s.will_be_paused,
        lambda s: [
            s.running_text("write a checkpoint and free their GPUs' memory; nothing that was trained is lost."),
            "No new trial starts until the sweep is continued. It keeps its GPUs and its place: no sweep that waits "
            "starts instead. Stop gives them free.",
        ],
        "/sweeps/{name}/pause",
        fields=(_WHY,),
        undo=_to("continue", "unpause"),
    ),
    Action(
        "unpause",
        "Continue",
        lambda s: _is_sweep(s) and s.will_be_paused,
        lambda s: ["Paused trials continue from their checkpoints.", s.left()],
        "/sweeps/{name}/unpause",
        fields=(_WHY,),
        undo=_to("pause", "pause"),
    ),
    Action(
        "stop",
        "Stop",
        lambda s: _is_sweep(s) and (s.is_judged or (s.is_driven and not s.is_waiting)),
        lambda s: s.stop_costs(),
        "/sweeps/{name}/stop",
        fields=(_WHY,),
        undo=_to("resume", "resume"),
    ),
    Action(
        "withdraw",
        "Withdraw",
        lambda s: _is_sweep(s) and s.is_waiting,
        lambda _: ["It leaves the queue before it is started; it costs its place among those of its priority."],
        "/sweeps/{name}/withdraw",
        fields=(_WHY,),
        undo=_to("let it wait again", "resume"),
    ),
    Action(
        "resume",
        "Resume",
        lambda s: _has_ended(s) and _is_resumable(s),
        lambda s: [
            "It waits at the end of its priority in the queue and continues from its checkpoints.",
            s.left(),
            s.cost_of_one(),
        ],
        "/sweeps/{name}/resume",
        lambda given: {
            "body": {
                "retry_failed": bool(given.get("retry_failed")),
                "overrides": _settings(given.get("settings", "")),
            }
        },
        (
            Field("retry_failed", "Try all failed trials again, each with its number", "check"),
            Field("settings", "Changed settings, one a line", "lines", "optional, for example budget.trials=40"),
        ),
        _to("withdraw it", "withdraw"),
    ),
    Action(
        "priority",
        "Priority",
        lambda s: _is_sweep(s) and s.is_waiting,
        lambda _: ["Sweeps of larger priority start first; sweeps that run are not interrupted."],
        "/sweeps/{name}/priority",
        lambda given: {"body": {"priority": given.get("priority", "").strip()}},
        (
            Field(
                "priority",
                "Priority, -1000 to 1000",
                "number",
                value=lambda s: str(s.queued.priority if s.queued else 0),
                required=True,
            ),
        ),
        lambda s: ("the priority before", f"{s.url}/actions/priority?priority={s.queued.priority if s.queued else 0}"),
    ),
    Action(
        "budget",
        "Budget",
        lambda s: _is_sweep(s) and s.frame is not None and s.state != "abandoned",
        lambda s: [
            "A larger budget trains more trials, a smaller one ends the sweep earlier; trials that run are finished.",
            s.cost_of_one(),
        ],
        "/sweeps/{name}/budget",
        lambda given: {"body": {"settings": _settings(given.get("settings", ""))}},
        (Field("settings", "Budget, one setting a line", "lines", "null: no limit", _budget_now, required=True),),
        _budget_undo,
    ),
    Action(
        "enqueue",
        "Add a trial",
        lambda s: _is_sweep(s) and s.frame is not None and s.state != "abandoned",
        lambda s: [
            "The trial runs next, in addition to the budget. It cannot be taken back; it can be pruned.",
            s.cost_of_one(),
        ],
        "/sweeps/{name}/trials",
        lambda given: _trial_settings(given, "again"),
        (_SETTINGS_LINES, Field("again", "Train a trial with these settings once more, with another seed", "check")),
    ),
    Action(
        "judge",
        "Judge",
        lambda s: _has_ended(s) and s.frame is not None and bool(s.frame.ranked),
        lambda s: s.judge_costs(),
        "/sweeps/{name}/judge",
        _judging,
        (
            Field("top", "Number of best trials", "number", "empty: as in the sweep's file"),
            Field("prompts", "Number of prompts", "number", "empty: as in the sweep's file"),
            Field("confirm_cost", "Use an endpoint that may cost money", "check"),
        ),
    ),
    Action(
        "abandon",
        "End for good",
        lambda s: _is_sweep(s) and s.frame is not None and s.state not in ("abandoned", "finished"),
        lambda s: [
            s.running_text("stop. Unfinished trials end as PRUNED; results and report stay."),
            "This cannot be undone: the sweep is never resumed.",
        ],
        "/sweeps/{name}/stop",
        lambda given: {"body": {"why": given.get("why", "")[:500], "abandon": True}},
        (_WHY,),
        is_final=True,
    ),
    Action(
        "archive",
        "Archive",
        lambda s: _has_ended(s) and s.frame is not None,
        lambda s: s.archive_costs(),
        "/sweeps/{name}/archive",
        lambda given: {"body": {"url": given.get("url", "")}},
        (Field("url", "URL", about="s3://, gs://, file:// or another fsspec URL", required=True),),
        _to("bring it back", "unarchive"),
        leads_to="/",
    ),
    Action(
        "unarchive",
        "Bring back",
        lambda s: s.trial is None and s.state == ARCHIVED,
        lambda _: ["Its files are copied from the archive to this machine and compared."],
        "/sweeps/{name}/unarchive",
        lambda _: {"body": {}},
    ),
    Action(
        "delete",
        "Delete",
        lambda s: _has_ended(s) and s.state != "unreadable",
        lambda s: (
            plan_deletion(s.name, s.context.root).lines()
            if not s.context.is_unbegun(s.name)
            else ["It has not begun: its file and its history are removed from the queue's records."]
        ),
        "/sweeps/{name}",
        lambda given: {"keep_mlflow": bool(given.get("keep_mlflow"))},
        (Field("keep_mlflow", "Keep its runs in MLflow", "check"),),
        method="DELETE",
        is_final=True,
        leads_to="/",
    ),
    Action(
        "prune",
        "Prune",
        lambda s: _open_trial(s, TrialState.RUNNING, TrialState.PAUSED),
        lambda s: [
            s.of_trial(),
            "It ends as PRUNED and cannot win. This cannot be undone; a clone trains the settings again.",
        ],
        "/sweeps/{name}/trials/{trial}/prune",
        fields=(Field("why", "Reason, for the history", required=True),),
        is_final=True,
    ),
    Action(
        "pause",
        "Pause",
        lambda s: _open_trial(s, TrialState.RUNNING) and s.is_driven and not s.will_be_paused,
        lambda s: [s.of_trial(), "It writes a checkpoint and frees its place for another trial; nothing is lost."],
        "/sweeps/{name}/trials/{trial}/pause",
        fields=(_WHY,),
        undo=_to("continue", "unpause"),
    ),
    Action(
        "unpause",
        "Continue",
        lambda s: _open_trial(s, TrialState.PAUSED) or (_open_trial(s, TrialState.RUNNING) and s.will_be_paused),
        lambda s: [s.of_trial(), "It continues from its checkpoint before any new trial."],
        "/sweeps/{name}/trials/{trial}/unpause",
        fields=(_WHY,),
        undo=_to("pause", "pause"),
    ),
    Action(
        "retry",
        "Retry",
        lambda s: _open_trial(s, TrialState.FAILED),
        lambda s: [s.of_trial(), "It begins again from the initial model, before any new trial.", s.cost_of_one()],
        "/sweeps/{name}/retry",
        lambda given: {"body": {"why": given.get("why", "")[:500], "trials": [int(given["trial"])]}},
        (_WHY,),
    ),
    Action(
        "clone",
        "Clone",
        lambda s: s.trial is not None and s.state != "abandoned",
        lambda s: [
            "A copy with the changed settings runs next, in addition to the budget. It can be pruned.",
            s.cost_of_one(),
        ],
        "/sweeps/{name}/trials/{trial}/clone",
        lambda given: _trial_settings(given, "from_checkpoint"),
        (
            _SETTINGS_LINES,
            Field("from_checkpoint", "Continue from its newest checkpoint instead of the initial model", "check"),
        ),
    ),
)


def actions_for(api: ApiCalls, subject: Subject, person: Person) -> list[Action]:
    """Return the actions that this person can do with the subject now."""
    return [
        action for action in ACTIONS if person.role >= api.role(action.method, action.path) and action.applies(subject)
    ]


def find_action(subject: Subject, key: str) -> Action:
    """Return the subject's action of this key. Raises HTTPException: it does not apply now."""
    found = next((action for action in ACTIONS if action.key == key and action.applies(subject)), None)
    if found is None:
        trial = subject.trial
        what = subject.name if trial is None else f"trial {trial.label} of {subject.name}"
        state = subject.state if trial is None or subject.frame is None else shown_state(subject.frame, trial)
        why = f"there is nothing to {key}"
        if key == "resume" and subject.is_driven:
            why = "where it was asked to stop, it can be resumed once its trials have written their checkpoints"
        raise HTTPException(HTTPStatus.CONFLICT, f"{what} is {state}: {why}")
    return found
