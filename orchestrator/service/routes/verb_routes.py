"""Routes that change a sweep: stopped, paused, resumed, its budget, its trials, judged, archived, deleted.

Each calls the function of the command of that name, for the person who asks.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field

from orchestrator.api import open_sweep
from orchestrator.commands.budget_control import set_budget
from orchestrator.commands.judge_sweep import judge_config
from orchestrator.commands.request_commands import (
    RequestRefused,
    enqueue_clone,
    enqueue_trial,
    open_study,
    request_control,
    request_retries,
)
from orchestrator.commands.runs_folder.sweep_archive import archive_sweep, unarchive_sweep
from orchestrator.commands.runs_folder.sweep_deletion import delete_sweep, finish_deletion, half_deleted, plan_deletion
from orchestrator.driver.judge_stage import CostNotConfirmed, endpoint_key
from orchestrator.errors import NoTrialCompleted, SweepHeld
from orchestrator.execution.slots import machine_gpus, plan_slots
from orchestrator.folders import SweepFolder, existing_sweep, known_sweeps, lock_holder
from orchestrator.service.access_tokens import Person
from orchestrator.service.driver_supervisor import interrupt_driver, interrupt_judge
from orchestrator.service.judge_processes import begin_judging, interrupt_starting_judge
from orchestrator.service.routes.trial_routes import Trial
from orchestrator.service.service_context import (
    HIGHEST_PRIORITY,
    Admin,
    Key,
    Operator,
    Reason,
    ServiceContext,
    Settings,
    as_json,
    queue_json,
    reason,
)
from orchestrator.service.sweep_queue import AlreadyQueued, QueueRefused, QueueState
from orchestrator.spec.estimates.arrangement import arranged
from orchestrator.spec.estimates.disk_space import format_bytes
from orchestrator.spec.loading.loader import load_spec
from orchestrator.study.retried_trials import never_trained
from orchestrator.study.study import Study
from orchestrator.study.trial_records import RequestKind


class Stop(Reason):
    """How a sweep is stopped."""

    abandon: bool = Field(default=False, description="End it for good, running or not: unfinished trials are PRUNED.")


class Resumption(Reason):
    """How a sweep is resumed."""

    retry_failed: bool = Field(default=False, description="Try all failed trials again, each with its number.")
    overrides: list[str] = Field(default=[], max_length=200, description="Changes as PATH=VALUE, as of --set.")


class Priority(BaseModel):
    """A waiting sweep's new place."""

    model_config = ConfigDict(extra="forbid")

    priority: int = Field(ge=-HIGHEST_PRIORITY, le=HIGHEST_PRIORITY)


class Budget(BaseModel):
    """Changes of a sweep's budget."""

    model_config = ConfigDict(extra="forbid")

    settings: list[str] = Field(min_length=1, max_length=20, description="As `budget.trials=20`; null lifts a limit.")


class Enqueued(Settings):
    """A trial to run next."""

    again: bool = Field(default=False, description="Train a trial with these settings once more, with another seed.")


class Clone(Settings):
    """A copy of a trial with some settings changed."""

    from_checkpoint: bool = Field(default=False, description="Start from the trial's newest checkpoint.")


class FailedTrials(Reason):
    """Failed trials to try again."""

    trials: list[int] = Field(min_length=1, max_length=1000)


class Judging(BaseModel):
    """What is judged, instead of the sweep file's `judge`."""

    model_config = ConfigDict(extra="forbid")

    top: int | None = Field(default=None, ge=1, description="Number of best trials.")
    prompts: int | None = Field(default=None, ge=1, description="Number of prompts.")
    samples: int | None = Field(default=None, ge=1, description="Answers per prompt.")
    confirm_cost: bool = Field(default=False, description="Use a paid endpoint.")


class ArchiveUrl(BaseModel):
    """Where an archive is."""

    model_config = ConfigDict(extra="forbid")

    url: str = Field(default="", max_length=2000, description="s3://, gs://, file:// or another fsspec URL.")


# Of requests without a body.
_STOP, _RESUMPTION, _NO_REASON, _JUDGING, _KNOWN_URL = Stop(), Resumption(), Reason(), Judging(), ArchiveUrl()


def verb_routes(context: ServiceContext) -> APIRouter:
    """Return the routes."""
    routes, root, queue = APIRouter(prefix="/api/v1/sweeps/{name}", tags=["changes"]), context.root, context.queue
    judges = list[subprocess.Popen[bytes]]()

    def control(person: Person, name: str, kind: RequestKind, trial: int | None, why: str) -> dict[str, Any]:
        return context.control(person, name, lambda: request_control(name, root, kind, trial, why))

    # --- the sweep -----------------------------------------------------------------------------------------------

    @routes.post("/stop")
    def stop(person: Operator, name: str, body: Stop = _STOP) -> dict[str, Any]:
        """Stop a running sweep with checkpoints, or take a waiting one out of the queue."""
        waits = (sweep := context.queued(name)) is not None and sweep.state is QueueState.WAITING
        if waits:
            queue.withdraw(name, reason(person, body.why, "withdrawn"))
            if not body.abandon or name not in known_sweeps(root):
                return {"name": name, "notices": [f"{name} waits no longer"]}
        driven = sweep if sweep is not None and sweep.state is QueueState.DRIVEN else None
        folder = existing_sweep(root, name) if sweep is None else SweepFolder(root, name)
        has_begun = Study.exists(folder) and (body.abandon or lock_holder(folder) is not None)
        if driven is not None and not has_begun and interrupt_driver(root, driven):
            queue.record_stop(name, f"stopped while it was starting: {reason(person, body.why, 'stopped')}")
            return {"name": name, "notices": [f"{name} is stopped while it was starting; resume begins it again"]}
        is_judge = not body.abandon and name in known_sweeps(root)
        if is_judge and (interrupt_judge(root, name) or interrupt_starting_judge(folder)):
            queue.record_stop(name, f"judging ended: {reason(person, body.why, 'stopped')}")
            return {"name": name, "notices": [f"judging {name} ends; what is judged stays, and judge continues it"]}
        if not body.abandon:
            return control(person, name, RequestKind.STOP, None, body.why or "stopped")
        return context.control(person, name, lambda: open_sweep(name, root).abandon(why=body.why))

    @routes.post("/withdraw")
    def withdraw(person: Operator, name: str, body: Reason = _NO_REASON) -> dict[str, Any]:
        """Take a waiting sweep out of the queue."""
        queue.withdraw(name, reason(person, body.why, "withdrawn"))
        return {"name": name, "notices": [f"{name} waits no longer"]}

    @routes.post("/priority")
    def set_priority(_: Operator, name: str, body: Priority) -> dict[str, Any]:
        """Change the place of a waiting sweep."""
        return {"name": name, "queue": queue_json(queue.set_priority(name, body.priority))}

    @routes.post("/pause")
    def pause(person: Operator, name: str, body: Reason = _NO_REASON) -> dict[str, Any]:
        """Pause a running sweep: its trials are checkpointed, no new ones start."""
        return control(person, name, RequestKind.PAUSE, None, body.why)

    @routes.post("/unpause")
    def unpause(person: Operator, name: str, body: Reason = _NO_REASON) -> dict[str, Any]:
        """Continue a paused sweep."""
        return control(person, name, RequestKind.UNPAUSE, None, body.why)

    @routes.post("/resume")
    def resume(person: Operator, name: str, body: Resumption = _RESUMPTION) -> dict[str, Any]:
        """Let a sweep that has ended wait again; one that a command began comes into the queue."""
        sweep = context.queued(name)
        if sweep is not None and not sweep.state.has_ended:
            raise AlreadyQueued(sweep)
        if sweep is None or name in known_sweeps(root):
            folder = existing_sweep(root, name)
            if (holder := lock_holder(folder)) is not None:
                raise SweepHeld(name, holder)
        notices, changed = list[str](), None
        if body.overrides:
            waiting = "" if sweep is None or name in known_sweeps(root) else sweep.spec
            changed = context.submissions.change(person, name, body.overrides, waiting)
            notices += as_json(changed.notices) or [f"{name} has these values already: nothing is changed"]
        if body.retry_failed:
            notices += context.control(person, name, lambda: _retry_failed(context, name, body.why))["notices"]
        how = f" with {', '.join(body.overrides)}" if body.overrides else ""
        gpus = None if changed is None else changed.gpus
        if sweep is None:
            gpus = _gpus(existing_sweep(root, name)) if gpus is None else gpus
            sweep = queue.adopt(name, owner=person.name, gpus=gpus, how=how)
        else:
            sweep = queue.resume(name, how=how, spec="" if changed is None else changed.spec, gpus=gpus)
        return {"name": name, "queue": queue_json(sweep), "notices": notices}

    @routes.post("/budget")
    def budget(person: Operator, name: str, body: Budget, key: Key = "") -> dict[str, Any]:
        """Change the budget of a sweep while it runs, as `orchestrate set`."""
        request = ["budget", body.model_dump()]
        return context.control(person, name, lambda: set_budget(name, root, body.settings), key, request)

    @routes.post("/judge", status_code=HTTPStatus.ACCEPTED)
    def judge(person: Operator, name: str, body: Judging = _JUDGING, key: Key = "") -> dict[str, Any]:
        """Judge the best trials' answers in the background; the sweep's log has its progress."""

        def begin() -> list[str]:
            judges[:] = [process for process in judges if process.poll() is None]
            judges.append(_begin_judging(context, name, body))
            return [f"{name} is being judged (process {judges[-1].pid}); `orchestrate logs {name} -f` shows how far"]

        return context.control(person, name, begin, key, ["judge", body.model_dump()])

    # --- its trials ----------------------------------------------------------------------------------------------

    @routes.post("/trials", status_code=HTTPStatus.CREATED)
    def enqueue(person: Operator, name: str, body: Enqueued, key: Key = "") -> dict[str, Any]:
        """Enqueue a trial with these settings; it runs next, in addition to budget.trials."""
        context.submissions.check_overrides(person, body.overrides)
        request = ["enqueue", body.model_dump()]
        return context.control(
            person, name, lambda: enqueue_trial(name, root, body.overrides, again=body.again), key, request
        )

    @routes.post("/trials/{trial}/clone", status_code=HTTPStatus.CREATED)
    def clone(person: Operator, name: str, trial: Trial, body: Clone, key: Key = "") -> dict[str, Any]:
        """Enqueue a copy of a trial with some settings changed, from the initial model or its newest checkpoint."""
        context.submissions.check_overrides(person, body.overrides)

        def enqueue_it() -> list[str]:
            return enqueue_clone(name, root, trial, body.overrides, body.why, from_checkpoint=body.from_checkpoint)

        return context.control(person, name, enqueue_it, key, ["clone", trial, body.model_dump()])

    @routes.post("/trials/{trial}/stop")
    def stop_trial(person: Operator, name: str, trial: Trial, body: Reason = _NO_REASON) -> dict[str, Any]:
        """Stop a trial for good; its state becomes PRUNED."""
        return control(person, name, RequestKind.STOP, trial, body.why or "stopped")

    @routes.post("/trials/{trial}/prune")
    def prune(person: Operator, name: str, trial: Trial, body: Reason = _NO_REASON) -> dict[str, Any]:
        """Prune a trial with a reason; its state becomes PRUNED."""
        if not body.why:
            raise RequestRefused("a trial is pruned with a reason, which the history keeps: give `why`")
        return control(person, name, RequestKind.PRUNE, trial, body.why)

    @routes.post("/trials/{trial}/pause")
    def pause_trial(person: Operator, name: str, trial: Trial, body: Reason = _NO_REASON) -> dict[str, Any]:
        """Pause a trial: it is checkpointed and frees its slot."""
        return control(person, name, RequestKind.PAUSE, trial, body.why)

    @routes.post("/trials/{trial}/unpause")
    def unpause_trial(person: Operator, name: str, trial: Trial, body: Reason = _NO_REASON) -> dict[str, Any]:
        """Continue a paused trial."""
        return control(person, name, RequestKind.UNPAUSE, trial, body.why)

    @routes.post("/retry")
    def retry(person: Operator, name: str, body: FailedTrials, key: Key = "") -> dict[str, Any]:
        """Try failed trials again, each with its number and configuration."""
        request = ["retry", body.model_dump()]
        return context.control(person, name, lambda: request_retries(name, root, body.trials, body.why), key, request)

    # --- its folder ----------------------------------------------------------------------------------------------

    @routes.get("/deletion")
    def deletion(_: Admin, name: str, keep_mlflow: bool = False) -> dict[str, Any]:
        """Return what the deletion of a sweep would remove and free, one thing a line; nothing is changed."""
        if context.is_unbegun(name):
            lines = [f"{name} has not begun: the queue's records of it are removed"]
            return {"name": name, "lines": lines, "frees": 0}
        plan = plan_deletion(name, root, keep_mlflow=keep_mlflow)
        return as_json({"name": name, "lines": plan.lines(), "frees": plan.frees})

    @routes.delete("")
    def delete(_: Admin, name: str, keep_mlflow: bool = False) -> dict[str, Any]:
        """Delete a sweep that no driver runs: its folder, its study and its runs in MLflow."""
        _check_has_ended(context, name)
        notices: list[str] = []
        if name in half_deleted(root):
            freed = format_bytes(finish_deletion(root, name))
            notices.append(f"the deletion of a sweep named {name} was interrupted: it is finished now ({freed})")
        if name in known_sweeps(root) or (not notices and context.queued(name) is None):
            plan = plan_deletion(name, root, keep_mlflow=keep_mlflow)
            delete_sweep(plan)
            notices += [*plan.lines(), f"{name} is deleted; {format_bytes(plan.frees)} freed"]
        queue.forget(name)
        return as_json({"name": name, "notices": notices or [f"{name} is out of the queue's records"]})

    @routes.post("/archive")
    def archive(_: Admin, name: str, body: ArchiveUrl = _KNOWN_URL) -> dict[str, Any]:
        """Move a sweep's folder to a URL; answers once each file is compared. An interrupted call is continued."""
        if not body.url:
            raise RequestRefused("give the `url` of the archive, such as s3://bucket/folder")
        _check_has_ended(context, name)
        notices: list[str] = []
        archive_sweep(name, root, body.url, notices.append)
        return as_json({"name": name, "notices": notices})

    @routes.post("/unarchive")
    def unarchive(_: Admin, name: str, body: ArchiveUrl = _KNOWN_URL) -> dict[str, Any]:
        """Bring an archived sweep back; without `url` from where it was archived to."""
        notices: list[str] = []
        unarchive_sweep(name, root, body.url or None, notices.append)
        return as_json({"name": name, "notices": notices})

    return routes


def _retry_failed(context: ServiceContext, name: str, why: str) -> Sequence[str]:
    with open_study(existing_sweep(context.root, name), read_only=True) as study:
        failed = never_trained(study.trials())
    return request_retries(name, context.root, failed, why) if failed else [f"no trial of {name} has failed"]


def _gpus(folder: SweepFolder) -> int:
    """Return the GPUs that one trial of a sweep needs on this machine."""
    if Study.exists(folder):
        with Study.open(folder, read_only=True) as study:
            spec = study.spec
    else:
        spec = load_spec(folder.spec, is_new=False)
    chosen, _ = arranged(spec, [machine_gpus()], is_new=False)
    return plan_slots(chosen).gpus_needed[0]


def _begin_judging(context: ServiceContext, name: str, body: Judging) -> subprocess.Popen[bytes]:
    """Start `orchestrate judge` as a process that outlives the service, after the checks that cost nothing.

    Raises:
        SweepHeld, NoTrialCompleted, SpecError, CostNotConfirmed, QueueRefused: it would be refused.
    """
    folder = existing_sweep(context.root, name)
    if (holder := lock_holder(folder)) is not None:
        raise SweepHeld(name, holder)
    if not Study.exists(folder):
        raise NoTrialCompleted(f"no trial of {name} has completed yet: there is nothing to judge")
    given = {"top": body.top, "prompts": body.prompts, "samples": body.samples}
    overrides = [f"judge.{path}={value}" for path, value in given.items() if value is not None]
    with Study.open(folder, read_only=True) as study:
        if study.best() is None:
            raise study.no_best()
        config = judge_config(study.spec, folder, overrides)
    if config.endpoint is not None:
        endpoint_key(config.endpoint, name)
        if not body.confirm_cost:
            raise CostNotConfirmed(
                f"judge.endpoint: {config.endpoint.model} may cost money; confirm it with `confirm_cost`"
            )
    options = [part for one in overrides for part in ("--set", one)] + (["--yes"] if body.confirm_cost else [])
    return begin_judging(folder, options)


def _check_has_ended(context: ServiceContext, name: str) -> None:
    """Raise QueueRefused if the service is to start the sweep or has started it."""
    sweep = context.queued(name)
    if sweep is not None and not sweep.state.has_ended:
        if sweep.state is QueueState.WAITING:
            raise QueueRefused(f"{name} is waiting: withdraw it first")
        raise QueueRefused(f"{name} has a driver that runs it: stop it first")
