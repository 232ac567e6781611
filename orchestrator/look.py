"""Looking at a sweep without driving it: status, best, watch."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from dashboards.terminal import open_view
from orchestrator import lock
from orchestrator.errors import NoTrialCompleted
from orchestrator.folders import SweepFolder, existing
from orchestrator.places import DATA_FILE, RUNS_FILE
from orchestrator.retention import model_of
from orchestrator.spec.load import load
from orchestrator.spec.sweep import SweepSpec
from orchestrator.study.records import TrialRecord
from orchestrator.study.state import TrialState
from orchestrator.study.study import Study

_WATCH_SECONDS = 1.0


def status(name: str, root: Path) -> dict[str, Any]:
    """Where a sweep stands, as one object. `state` is preparing, running, interrupted or finished."""
    folder = existing(root, name)
    driver = lock.holder(folder)
    if not folder.database.exists():
        spec = load(folder.spec)
        state = "preparing" if driver else "interrupted"
        return _object(spec, state, driver, [], None, {}, None, 0.0)
    with Study.open(folder) as study:
        trials, best = study.trials(), study.best()
        over = study.exhausted() and all(t.state.finished for t in trials)
        state = "running" if driver else "finished" if over else "interrupted"
        seconds = study.elapsed_hours() * 3600
        return _object(study.spec, state, driver, trials, best, _run_ids(folder), _steps(folder, study.spec), seconds)


def _object(
    spec: SweepSpec,
    state: str,
    driver: str | None,
    trials: list[TrialRecord],
    best: TrialRecord | None,
    run_ids: dict[str, str],
    steps: int | None,
    seconds: float,
) -> dict[str, Any]:
    started = [t.started_at for t in trials if t.started_at is not None]
    return {
        "name": spec.name,
        "state": state,
        "driver": driver,
        "goal": {"metric": spec.goal.metric, "direction": spec.goal.direction},
        "best": None if best is None else best.number,
        "started": min(started, default=None),
        "elapsed": round(seconds, 1),
        "run_id": run_ids.get("sweep"),
        "trials": [_trial(t, run_ids, steps) for t in trials],
    }


def _trial(record: TrialRecord, run_ids: dict[str, str], steps: int | None) -> dict[str, Any]:
    return {
        "number": record.number,
        "state": record.state.value,
        "reason": record.reason,
        "attempts": record.attempts,
        "params": dict(record.params),
        "metrics": {name: _json(value) for name, value in record.metrics.items()},
        "value": _json(record.value),
        "step": record.step,
        "steps": steps,
        "run_id": run_ids.get(str(record.number)),
    }


def _json(value: float | None) -> float | str | None:
    """JSON has no NaN: it is told in words."""
    return value if value is None or abs(value) < float("inf") else str(value)


def _steps(folder: SweepFolder, spec: SweepSpec) -> int | None:
    """Updates of a trial with the base's training settings, once the data is known."""
    if spec.base.training.max_steps is not None:
        return spec.base.training.max_steps
    path = folder.path / DATA_FILE
    if not path.is_file():
        return None
    rows = json.loads(path.read_text(encoding="utf-8"))["train_rows"]
    training = spec.base.training
    return int(training.num_train_epochs * rows / training.pairs_per_update + 1e-9)


def _run_ids(folder: SweepFolder) -> dict[str, str]:
    path = folder.path / RUNS_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def best(name: str, root: Path) -> dict[str, Any]:
    """The best configuration so far; NoTrialCompleted before there is one."""
    folder = existing(root, name)
    if not folder.database.exists():
        raise NoTrialCompleted(f"no trial of {name} has completed yet")
    with Study.open(folder) as study:
        record = study.best()
        if record is None:
            raise NoTrialCompleted(f"no trial of {name} has completed yet")
        goal, model = study.spec.goal, model_of(folder, record)
    return {
        "number": record.number,
        "value": record.value,
        "goal": {"metric": goal.metric, "direction": goal.direction},
        "params": dict(record.params),
        "metrics": {metric: _json(value) for metric, value in record.metrics.items()},
        "step": record.step,
        "run_id": _run_ids(folder).get(str(record.number)),
        "model": None if model is None else str(model),
    }


def watch(name: str, root: Path) -> None:
    """Follow a sweep that another process drives, until it ends or Ctrl-C."""
    folder = existing(root, name)
    while not folder.database.exists() and lock.holder(folder):
        time.sleep(_WATCH_SECONDS)
    with Study.open(folder) as study:
        view = open_view(study.spec, Console(stderr=True), steps=_steps(folder, study.spec))
        seen: dict[int, tuple[TrialState, int, int]] = {}
        try:
            while True:
                driven = lock.holder(folder) is not None
                for record in study.trials():
                    mark = (record.state, record.attempts, record.step)
                    before = seen.get(record.number)
                    if before is None or before[:2] != mark[:2]:
                        view.trial_changed(record)
                    if before is None or before[2] != record.step:
                        view.points(record.number, study.points(record.number))
                    seen[record.number] = mark
                view.tick()
                if not driven:
                    return
                time.sleep(_WATCH_SECONDS)
        finally:
            view.close()
