"""What a page's buttons do: each action with the page that confirms it, what it costs, and what takes it back.

The actions are those of the commands; the requests carry the name of the person.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from urllib.parse import quote, urlencode

from fastapi import HTTPException

from dashboards.analysis.run_costs import costs
from dashboards.analysis.sweep_frame import SweepFrame, TrialFrame
from dashboards.formatting import format_hours
from orchestrator.commands.budget_control import set_budget
from orchestrator.commands.request_commands import enqueue_clone, enqueue_trial, request_control, request_retries
from orchestrator.commands.runs_folder.sweep_deletion import delete_sweep, plan_deletion
from orchestrator.service.access_tokens import Person, Role
from orchestrator.service.sweep_queue import QueuedSweep, QueueState, SweepQueue
from orchestrator.study.budget_changes import SETTABLE
from orchestrator.study.trial_records import TrialState


@dataclass(frozen=True, slots=True)
class Subject:
    """What an action is about: a sweep, or one of its trials, as it is now."""

    root: Path
    queue: SweepQueue
    name: str
    state: str
    """The sweep's, as `status` has it, or the queue's for one that has not begun."""
    queued: QueuedSweep | None
    frame: SweepFrame | None
    trial: TrialFrame | None = None

    @property
    def is_driven(self) -> bool:
        """Whether a driver runs it."""
        return self.state in ("running", "paused", "preparing")

    @property
    def is_waiting(self) -> bool:
        """Whether it waits in the queue."""
        return self.queued is not None and self.queued.state is QueueState.WAITING

    @property
    def url(self) -> str:
        """URL of the page of the sweep or trial."""
        of_trial = "" if self.trial is None else f"/trials/{self.trial.number}"
        return f"/sweeps/{quote(self.name)}{of_trial}"

    @property
    def unit(self) -> str:
        """In what the sweep's time is counted."""
        return "GPU-hours" if self.frame is not None and self.frame.gpus else "slot-hours"

    def trials_in(self, state: TrialState) -> list[TrialFrame]:
        """Return the trials in this state, each seed by itself."""
        return [] if self.frame is None else [t for t in self.frame.all_trials if t.record.state is state]

    def cost_of_one(self) -> str:
        """Return what another trial costs, from those that were trained to the end."""
        complete = self.trials_in(TrialState.COMPLETE)
        if not complete:
            return "No trial has completed, so that the cost of one is not measured yet; the plan estimates it."
        mean = costs(complete).seconds / len(complete)
        return f"A trial of this sweep took {format_hours(mean)} {self.unit} on average ({len(complete)} complete)."


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
    run: Callable[[Subject, Person, Mapping[str, str]], Sequence[str]]
    """Do it; returns notices."""
    fields: tuple[Field, ...] = ()
    undo: Callable[[Subject], tuple[str, str]] | None = None
    """Label and URL of what takes it back, from the subject as it was before; None: nothing does."""
    role: Role = Role.OPERATOR
    is_final: bool = False
    """Whether it destroys something."""
    leads_to: str = ""
    """Page that is shown after it; "": the subject's."""


_WHY = Field("why", "Reason, for the history", about="optional")


def _why(person: Person, given: Mapping[str, str], done: str) -> str:
    return f"{given.get('why', '')[:500] or done} (by {person.name} through the service)"


def _control(kind: str, done: str) -> Callable[[Subject, Person, Mapping[str, str]], Sequence[str]]:
    def run(subject: Subject, person: Person, given: Mapping[str, str]) -> Sequence[str]:
        number = None if subject.trial is None else subject.trial.number
        return request_control(subject.name, subject.root, kind, number, _why(person, given, done))

    return run


def _to(label: str, key: str, **values: str) -> Callable[[Subject], tuple[str, str]]:
    def undo(subject: Subject) -> tuple[str, str]:
        query = f"?{urlencode(values)}" if values else ""
        return label, f"{subject.url}/actions/{key}{query}"

    return undo


def _running_text(subject: Subject, what: str) -> str:
    count = len(subject.trials_in(TrialState.RUNNING))
    if not count:
        return "No trial runs at the moment."
    return f"{count} running trial{'' if count == 1 else 's'} {what}"


def _left(subject: Subject) -> str:
    if subject.frame is None or subject.frame.planned is None:
        return "It continues until its budget is used up."
    done = sum(trial.record.state.is_final for trial in subject.frame.all_trials)
    return f"{done} of {subject.frame.planned} planned trials are done; the others are trained."


def _withdraw(subject: Subject, person: Person, given: Mapping[str, str]) -> Sequence[str]:
    subject.queue.withdraw(subject.name, _why(person, given, "withdrawn"))
    return [f"{subject.name} waits no longer."]


def _resume(subject: Subject, _: Person, __: Mapping[str, str]) -> Sequence[str]:
    subject.queue.resume(subject.name)
    return [f"{subject.name} waits in the queue and is resumed when its turn comes."]


def _set_priority(subject: Subject, _: Person, given: Mapping[str, str]) -> Sequence[str]:
    text = given.get("priority", "").strip()
    if not text.removeprefix("-").isdecimal() or abs(int(text)) > 1000:
        raise HTTPException(
            HTTPStatus.UNPROCESSABLE_ENTITY, f"the priority is a number from -1000 to 1000, not {text!r}"
        )
    subject.queue.set_priority(subject.name, int(text))
    return [f"{subject.name} has priority {int(text)}."]


def _settings(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def _budget(subject: Subject, _: Person, given: Mapping[str, str]) -> Sequence[str]:
    wanted = _settings(given.get("settings", ""))
    if not wanted:
        raise HTTPException(
            HTTPStatus.UNPROCESSABLE_ENTITY, f"write PATH=VALUE, one a line; what can be set: {', '.join(SETTABLE)}"
        )
    return set_budget(subject.name, subject.root, wanted)


def _budget_now(subject: Subject) -> str:
    if subject.frame is None:
        return ""
    budget = subject.frame.spec.budget.model_dump(mode="json")
    return "\n".join(f"{path}={json.dumps(budget[path.partition('.')[2]])}" for path in SETTABLE)


def _budget_undo(subject: Subject) -> tuple[str, str]:
    return "set the budget back", f"{subject.url}/actions/budget?" + urlencode({"settings": _budget_now(subject)})


def _enqueue(subject: Subject, _: Person, given: Mapping[str, str]) -> Sequence[str]:
    return enqueue_trial(
        subject.name, subject.root, _settings(given.get("settings", "")), again=bool(given.get("again"))
    )


def _clone(subject: Subject, person: Person, given: Mapping[str, str]) -> Sequence[str]:
    assert subject.trial is not None
    return enqueue_clone(
        subject.name,
        subject.root,
        subject.trial.number,
        _settings(given.get("settings", "")),
        _why(person, given, "cloned"),
        from_checkpoint=bool(given.get("checkpoint")),
    )


def _retry(subject: Subject, person: Person, given: Mapping[str, str]) -> Sequence[str]:
    assert subject.trial is not None
    return request_retries(subject.name, subject.root, [subject.trial.number], _why(person, given, "retried"))


def _delete(subject: Subject, _: Person, given: Mapping[str, str]) -> Sequence[str]:
    if given.get("name", "") != subject.name:
        raise HTTPException(
            HTTPStatus.UNPROCESSABLE_ENTITY, f"write the name of the sweep, {subject.name}, to delete it"
        )
    delete_sweep(plan_deletion(subject.name, subject.root, keep_mlflow=bool(given.get("keep_mlflow"))))
    return [f"{subject.name} was deleted."]


def _of_trial(subject: Subject) -> str:
    """Return how far the trial is and what it cost."""
    trial = subject.trial
    assert trial is not None
    planned = f" of {trial.planned_updates}" if trial.planned_updates else ""
    spent = format_hours(costs([trial]).seconds)
    return f"Trial {trial.label} is at update {trial.curves.last_update}{planned} after {spent} {subject.unit}."


def _open_trial(subject: Subject, *states: TrialState) -> bool:
    return subject.trial is not None and subject.trial.record.state in states


_SETTINGS_LINES = Field("settings", "Settings, one a line", "lines", "for example loss.beta=3.0")

ACTIONS: tuple[Action, ...] = (
    Action(
        "pause",
        "Pause",
        lambda s: s.trial is None and s.state == "running",
        lambda s: [
            _running_text(s, "write a checkpoint and free their GPUs; nothing that was trained is lost."),
            "No new trial starts until the sweep is continued. It keeps its place.",
        ],
        _control("pause", "paused"),
        (_WHY,),
        _to("continue", "unpause"),
    ),
    Action(
        "unpause",
        "Continue",
        lambda s: s.trial is None and s.state == "paused",
        lambda s: ["Paused trials continue from their checkpoints.", _left(s)],
        _control("unpause", "continued"),
        (_WHY,),
        _to("pause", "pause"),
    ),
    Action(
        "stop",
        "Stop",
        lambda s: s.trial is None and s.is_driven and not s.is_waiting,
        lambda s: [
            _running_text(s, "write a checkpoint, then the driver ends and its GPUs are free for other sweeps."),
            "Resume continues from the checkpoints: the cost is the time to load models and data again.",
        ],
        _control("stop", "stopped"),
        (_WHY,),
        _to("resume", "resume"),
    ),
    Action(
        "withdraw",
        "Withdraw",
        lambda s: s.trial is None and s.is_waiting,
        lambda _: ["It leaves the queue before it is started; it costs its place among those of its priority."],
        _withdraw,
        (_WHY,),
        _to("let it wait again", "resume"),
    ),
    Action(
        "resume",
        "Resume",
        lambda s: s.trial is None and s.queued is not None and s.queued.state.has_ended and not s.is_driven,
        lambda s: [
            "It waits at the end of its priority in the queue and continues from its checkpoints.",
            _left(s),
            s.cost_of_one(),
        ],
        _resume,
        (),
        _to("stop", "stop"),
    ),
    Action(
        "priority",
        "Priority",
        lambda s: s.trial is None and s.is_waiting,
        lambda _: ["Sweeps of larger priority start first; sweeps that run are not interrupted."],
        _set_priority,
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
        lambda s: s.trial is None and s.frame is not None and s.state != "abandoned",
        lambda s: [
            "A larger budget trains more trials, a smaller one ends the sweep earlier; trials that run are finished.",
            s.cost_of_one(),
        ],
        _budget,
        (
            Field(
                "settings",
                "Budget, one setting a line",
                "lines",
                f"what can be set: {', '.join(SETTABLE)}",
                _budget_now,
            ),
        ),
        _budget_undo,
    ),
    Action(
        "enqueue",
        "Add a trial",
        lambda s: s.trial is None and s.frame is not None and s.state != "abandoned",
        lambda s: [
            "The trial runs next, in addition to the budget. It cannot be taken back; it can be pruned.",
            s.cost_of_one(),
        ],
        _enqueue,
        (_SETTINGS_LINES, Field("again", "Train a trial with these settings once more, with another seed", "check")),
    ),
    Action(
        "delete",
        "Delete",
        lambda s: s.trial is None and s.frame is not None and not s.is_driven and not s.is_waiting,
        lambda s: plan_deletion(s.name, s.root).lines(),
        _delete,
        (
            Field("name", "Name of the sweep, to confirm", required=True),
            Field("keep_mlflow", "Keep its runs in MLflow", "check"),
        ),
        role=Role.ADMIN,
        is_final=True,
        leads_to="/",
    ),
    Action(
        "prune",
        "Prune",
        lambda s: _open_trial(s, TrialState.RUNNING, TrialState.PAUSED),
        lambda s: [
            _of_trial(s),
            "It ends as PRUNED and cannot win. This cannot be undone; a clone trains the settings again.",
        ],
        _control("prune", "pruned"),
        (_WHY,),
        is_final=True,
    ),
    Action(
        "pause",
        "Pause",
        lambda s: _open_trial(s, TrialState.RUNNING) and s.is_driven,
        lambda s: [_of_trial(s), "It writes a checkpoint and frees its place for another trial; nothing is lost."],
        _control("pause", "paused"),
        (_WHY,),
        _to("continue", "unpause"),
    ),
    Action(
        "unpause",
        "Continue",
        lambda s: _open_trial(s, TrialState.PAUSED),
        lambda s: [_of_trial(s), "It continues from its checkpoint before any new trial."],
        _control("unpause", "continued"),
        (_WHY,),
        _to("pause", "pause"),
    ),
    Action(
        "retry",
        "Retry",
        lambda s: _open_trial(s, TrialState.FAILED),
        lambda s: [_of_trial(s), "It begins again from the initial model, before any new trial.", s.cost_of_one()],
        _retry,
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
        _clone,
        (
            _SETTINGS_LINES,
            Field("checkpoint", "Continue from its newest checkpoint instead of the initial model", "check"),
            _WHY,
        ),
    ),
)


def actions_for(subject: Subject, person: Person) -> list[Action]:
    """Return the actions that this person can do with the subject now."""
    return [action for action in ACTIONS if person.role >= action.role and action.applies(subject)]


def find_action(subject: Subject, key: str) -> Action:
    """Return the subject's action of this key. Raises HTTPException: it does not apply now."""
    of_trial = subject.trial is not None
    what = f"trial {subject.trial.label} of {subject.name}" if subject.trial else subject.name
    found = next((action for action in ACTIONS if action.key == key and action.applies(subject)), None)
    if found is None:
        state = subject.trial.state_label.lower() if of_trial and subject.trial else subject.state
        raise HTTPException(HTTPStatus.CONFLICT, f"{what} is {state}: there is nothing to {key}")
    return found
