"""The sweep's own run: what every trial has in common, told to tracking once."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dashboards.mlflow_pages.note import note
from dashboards.mlflow_pages.view import saved_view
from orchestrator.driving.stages import load_report
from orchestrator.folders import DATA_FILE, ENVIRONMENT_FILE, RUNS_FILE, SweepFolder
from orchestrator.spec.dump import spec_hash
from orchestrator.spec.sweep import SweepSpec
from orchestrator.study.study import Study
from orchestrator.tracking.environment import environment, environment_tags
from orchestrator.tracking.mlflow import MlflowReceiver, tracking_uri
from orchestrator.tracking.names import NOTE, trials_filter
from orchestrator.tracking.outbox import Outbox
from orchestrator.tracking.sink import SWEEP, Sink
from trainer.config import flatten
from trainer.storage.durable import write_json


def open_sink(study: Study, root: Path) -> Outbox:
    """An outbox in the sweep's folder that delivers to its MLflow."""
    tracking = study.spec.tracking
    uri = tracking_uri(root, tracking.uri)
    receiver = MlflowReceiver(
        root,
        uri=uri,
        experiment=tracking.experiment,
        artifacts=tracking.artifacts,
        sweep_id=study.id,
        sweep=study.spec.name,
        on_run=functools.partial(_remember, study.folder),
        view=saved_view(study.spec, trials_filter(study.spec.name), time.time()),
    )
    return Outbox(study.folder.outbox, receiver, fence=study.check_fence)


def tell_sweep(study: Study, sink: Sink, fingerprint: str, adapters: Sequence[str] = ()) -> None:
    """Start (or start again) the parent run, with the resolved file, the environment and the data's report.

    adapters: Sentences about what adapters change; the tag `lora.adapts`.
    """
    folder, spec = study.folder, study.spec
    found = environment()
    path = folder.path / ENVIRONMENT_FILE
    write_json(path, found)
    report = load_report(folder)
    tags = {} if report is None else {f"data.{name}": str(count) for name, count in report.counts().items()}
    tags |= {
        "state": "RUNNING",
        "reason": "",
        "spec.hash": spec_hash(spec),
        "data.fingerprint": fingerprint,
        "goal": f"{spec.goal.direction} {spec.goal.metric}",
        NOTE: note(spec, study.trials(), "running"),
    }
    if adapters:
        tags["lora.adapts"] = "\n".join(adapters)
    sink.start(SWEEP, name=spec.name, params=_params(spec), tags=tags | environment_tags(found), at=time.time())
    for file in (folder.spec, path, folder.path / DATA_FILE):
        sink.artifact(SWEEP, file)


def tell_end(study: Study, sink: Sink, state: str, status: str, reason: str) -> None:
    """The parent run's end; a later resume starts it again."""
    best = study.best()
    tags = {"state": state, "reason": reason}
    if best is not None:
        tags |= {"best.trial": str(best.number), "best.value": f"{best.value}"}
        tags |= {f"best.{path}": str(value) for path, value in best.params.items()}
    sink.end(SWEEP, status=status, tags=tags, at=time.time())


def _remember(folder: SweepFolder, run: str, run_id: str) -> None:
    """Keep MLflow's run ids beside the study, so that `status` needs no MLflow."""
    path = folder.path / RUNS_FILE
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if known.get(run) != run_id:
        write_json(path, known | {run: run_id})


def _params(spec: SweepSpec) -> dict[str, Any]:
    """How it searches: the leaves outside `base`, which belong to trials."""
    tree = spec.model_dump(mode="json", include={"sampler", "goal"})
    searched = {"search": list(spec.search.paths)}
    return flatten(tree) | searched
