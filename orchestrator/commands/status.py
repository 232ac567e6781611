"""Data of `status`, `best` and `history`, read from the study without the driver.

The history has every event with its time and reason, and every change of the spec.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator import folders
from orchestrator.commands.detached_driver import waiting_for
from orchestrator.commands.request_commands import open_study
from orchestrator.driver.checkpoint_retention import model_folder
from orchestrator.driver.crash_report import crashed_at, last_crash
from orchestrator.driver.data_stage import updates_if_known
from orchestrator.errors import NoTrialCompleted, StorageRefused
from orchestrator.execution.messages import MIRROR_EVENT
from orchestrator.folders import RUNS_FILE, SweepFolder, existing_sweep
from orchestrator.interfaces import UpdatesOf
from orchestrator.spec.loading.loader import load_spec
from orchestrator.spec.sweep_spec import SweepSpec
from orchestrator.study.reader import StudyReader
from orchestrator.study.repeats import first_number, merge_records
from orchestrator.study.retried_trials import never_trained
from orchestrator.study.study import Study
from orchestrator.study.sweep_terms import spec_differences
from orchestrator.study.trial_records import (
    ABANDONED,
    STOPPING,
    Request,
    TrialRecord,
    TrialState,
    requirements_text,
)
from orchestrator.tracking.deferred_messages import outbox_state

if TYPE_CHECKING:
    from orchestrator.commands.runs_folder.queue_records import QueueAction


def status(name: str, root: Path) -> dict[str, Any]:
    """Return the sweep's status as printed by `status --json`.

    `state` is preparing, running, paused, interrupted, abandoned or finished.
    """
    folder = existing_sweep(root, name)
    driver = folders.lock_holder(folder)
    if not Study.exists(folder):
        spec = load_spec(folder.spec, is_new=False)
        state = "preparing" if driver else "interrupted"
        found = _status_object(spec, state, driver, [], [], {}, None, 0.0)
        return found | {"initial": {}, "why": waiting_for(folder) if driver else last_crash(folder)}
    with Study.open(folder, read_only=True) as study, study.at_one_moment():
        trials, front = study.trials(), study.pareto_front()
        state, usage = sweep_state(study), study.usage()
        updates_of = updates_if_known(folder, study.spec)
        found = _status_object(
            study.spec, state, driver, trials, front, _run_ids(folder), updates_of, usage.hours * 3600
        )
        at_work = study.trials_at_work() if driver else set[int]()
        for trial in (*found["trials"], *found.get("configurations", ())):
            numbers = {trial["number"], *(seed["trial"] for seed in trial.get("seeds", ()))}
            is_idle = trial["state"] == TrialState.RUNNING.value and not numbers & at_work
            trial["idle"] = ("waiting" if driver else "interrupted") if is_idle else ""
        return found | {
            "initial": {metric: json_number(value) for metric, value in study.initial_metrics().items()},
            "why": study.pause_reason()
            if state == "paused"
            else waiting_for(folder)
            if driver
            else study.stop_reason() or study.no_more_trials_reason(),
            "never_trained": never_trained(trials),
            **({"requirements": text} if (text := requirements_text(study.ranked())) else {}),
            **_finalists(study),
            "gpu_hours": round(usage.gpu_hours, 6),
            "mirror": _mirror(study),
            "tracking": None if (outbox := outbox_state(folder.outbox)) is None else outbox.as_json(),
            "waiting": [f"enqueued: {g.origin}" for g in study.enqueued_trials() if g.trial is None]
            + [_request_text(request) for request in study.requests()],
        }


def _finalists(study: StudyReader) -> dict[str, Any]:
    """Return the comparison of the finalists with their values in the search; nothing in a sweep without."""
    if study.spec.finalists is None:
        return {}
    found = study.confirmation()
    if found is None:
        return {"finalists": None}
    search = merge_records([record for record in study.trials() if record.finalist_of is None], study.spec)
    return {"finalists": found.as_json({first_number(r): json_number(r.value) for r in search})}


def _mirror(study: Study) -> dict[str, Any] | None:
    """Return the number of mirror failures and the last one; None where the sweep has no mirror."""
    if study.spec.mirror is None:
        return None
    messages = [event.text for event in study.events() if event.kind == MIRROR_EVENT]
    return {"url": study.spec.mirror, "told": len(messages), "last": messages[-1] if messages else None}


def _request_text(request: Request) -> str:
    target = "the sweep" if request.trial is None else f"trial {request.trial}"
    return f"request pending: {request.kind} {target}, {request.text}"


def sweep_state(study: Study) -> str:
    """Return running, paused, finished, abandoned or interrupted."""
    if folders.driver_of(study.folder):
        return "paused" if study.pause_reason() else "running"
    if study.stop_reason().startswith(ABANDONED):
        return ABANDONED
    has_ended = all(trial.state.is_final for trial in study.trials()) and bool(study.no_more_trials_reason())
    return "finished" if has_ended else "interrupted"


def _status_object(
    spec: SweepSpec,
    state: str,
    driver: str | None,
    trials: list[TrialRecord],
    front: list[TrialRecord],
    run_ids: dict[str, str],
    updates_of: UpdatesOf | None,
    seconds: float,
) -> dict[str, Any]:
    started = [t.started_at for t in trials if t.started_at is not None]
    return {
        "name": spec.name,
        "state": state,
        "driver": driver,
        "goal": {"metric": spec.first_objective.metric, "direction": spec.first_objective.direction},
        "goals": [{"metric": objective.metric, "direction": objective.direction} for objective in spec.objectives],
        "best": front[0].number if front else None,
        "front": [record.number for record in front],
        "started": min(started, default=None),
        "elapsed": round(seconds, 1),
        "run_id": run_ids.get("sweep"),
        "trials": [_trial(t, run_ids, updates_of) for t in trials],
    } | _configurations(spec, trials, run_ids, updates_of)


def _configurations(
    spec: SweepSpec, trials: list[TrialRecord], run_ids: dict[str, str], updates_of: UpdatesOf | None
) -> dict[str, Any]:
    """Return `configurations`, one entry for all seeds of each; nothing where no trial repeats another."""
    merged = merge_records(trials, spec)
    if not any(record.seeds for record in merged):
        return {}
    return {"configurations": [_trial(record, run_ids, updates_of) | _seeds(record) for record in merged]}


def _seeds(record: TrialRecord) -> dict[str, Any]:
    """Return the mean's interval and number of seeds, and each trial's seed; nothing for a single trial."""
    if not record.seeds:
        return {}
    return {
        "label": record.label,
        "interval": None if record.interval is None else list(record.interval),
        "complete_seeds": record.complete_seeds,
        "seeds": [
            {"trial": s.trial, "seed": s.seed, "state": s.state.value, "value": json_number(s.value)}
            for s in record.seeds
        ],
    }


def _trial(record: TrialRecord, run_ids: dict[str, str], updates_of: UpdatesOf | None) -> dict[str, Any]:
    return {
        "number": record.number,
        "state": record.state.value,
        "diverged": record.diverged,
        "idle": "",
        "reason": record.reason,
        "origin": record.origin,
        "parent": record.parent,
        **({} if record.finalist_of is None else {"finalist_of": record.finalist_of}),
        "from_update": None if record.fork is None else record.fork.step,
        "attempts": record.attempts,
        "failed_attempts": [asdict(failed) for failed in record.failed_attempts],
        "params": dict(record.params),
        "metrics": {name: json_number(value) for name, value in record.metrics.items()},
        "value": json_number(record.value),
        "values": None if record.values is None else [json_number(value) for value in record.values],
        "step": record.step,
        "steps": None if updates_of is None else updates_of(record.params),
        "run_id": run_ids.get(str(record.number)),
    } | ({"breaks": list(record.breaks)} if record.violations else {})


def json_number(value: float | None) -> float | str | None:
    """Replace NaN and infinities, which JSON lacks, by their names."""
    return value if value is None or abs(value) < float("inf") else str(value)


def _run_ids(folder: SweepFolder) -> dict[str, str]:
    path = folder.path / RUNS_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def best(name: str, root: Path) -> dict[str, Any]:
    """Return the best configuration so far as printed by `best --json`.

    Raises:
        NoTrialCompleted: no trial is complete.
    """
    folder = existing_sweep(root, name)
    if not Study.exists(folder):
        raise NoTrialCompleted(f"no trial of {name} has completed yet")
    with Study.open(folder, read_only=True) as study:
        front = study.pareto_front()
        if not front:
            raise study.no_best()
        record, objectives = front[0], study.spec.objectives
        objective, model = study.spec.first_objective, model_folder(folder, record)
        initial, finalists = study.initial_metrics(record), _finalists(study)
    return {
        **finalists,
        "number": record.number,
        "value": record.value,
        **_seeds(record),
        "values": None if record.values is None else list(record.values),
        "goal": {"metric": objective.metric, "direction": objective.direction},
        "goals": [{"metric": each.metric, "direction": each.direction} for each in objectives],
        "initial": {metric: json_number(value) for metric, value in initial.items()},
        "front": [
            {"number": r.number, "values": list(r.values or ()), "params": dict(r.params)}
            for r in (front if len(objectives) > 1 else ())
        ],
        "origin": record.origin,
        "parent": record.parent,
        **({} if record.finalist_of is None else {"finalist_of": record.finalist_of}),
        "from_update": None if record.fork is None else record.fork.step,
        "params": dict(record.params),
        "metrics": {metric: json_number(value) for metric, value in record.metrics.items()},
        "step": record.step,
        "run_id": _run_ids(folder).get(str(record.number)),
        "model": None if model is None else str(model),
    }


def history(name: str, root: Path, actions: Sequence[QueueAction] | None = None) -> dict[str, Any]:
    """Return `events` (seq, at, trial, kind, text), `specs` (version, at, hash, changes), `given` (enqueued), `queue`.

    Args:
        name: a sweep that has begun, or that the service's queue has.
        root: the runs folder.
        actions: what was done with it in the queue (at, person, action); None: read from the queue. Where that cannot
            be read, `queue` is empty and `queue_problem` says why.
    """
    problem = ""
    if actions is None:
        actions, problem = _queue_actions(root, name)
    rest = {"queue": [asdict(action) for action in actions]} | ({"queue_problem": problem} if problem else {})
    folder = SweepFolder(root, name) if actions else existing_sweep(root, name)
    if not StudyReader.exists(folder) and ((reason := last_crash(folder)) or actions):
        event = {"seq": 1, "at": crashed_at(folder), "trial": None, "kind": STOPPING, "text": reason}
        return {"name": name, "events": [event] if reason else [], "specs": [], "given": [], **rest}
    with open_study(folder, read_only=True) as study:
        versions = study.spec_history()
        specs = [SweepSpec.from_stored(v.text) for v in versions]
        changes = [[], *([asdict(c) for c in spec_differences(old, new)] for old, new in pairwise(specs))]
        return {
            "name": name,
            "events": [asdict(event) for event in study.events()],
            "specs": [
                {"version": v.version, "at": v.at, "hash": v.hash, "changes": changed}
                for v, changed in zip(versions, changes, strict=True)
            ],
            "given": [enqueued.as_json() for enqueued in study.enqueued_trials()],
            **rest,
        }


def _queue_actions(root: Path, name: str) -> tuple[Sequence[QueueAction], str]:
    """Return the actions with a sweep in the queue, and why they cannot be read; "" where they can."""
    from orchestrator.commands.runs_folder.queue_records import queue_actions

    try:
        return queue_actions(root, name), ""
    except StorageRefused as error:
        return [], str(error)
