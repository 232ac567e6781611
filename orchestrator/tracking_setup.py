"""The sweep's own run: what every trial has in common, told to tracking once."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from orchestrator.folders import SweepFolder
from orchestrator.places import DATA_FILE, ENVIRONMENT_FILE, RUNS_FILE
from orchestrator.spec.dump import spec_hash
from orchestrator.spec.sweep import SweepSpec
from orchestrator.study.study import Study
from orchestrator.tracking.environment import environment, environment_tags
from orchestrator.tracking.mlflow import RUN, SWEEP_ID, MlflowReceiver, connect, ensure_experiment, tracking_uri
from orchestrator.tracking.outbox import Outbox
from orchestrator.tracking.sink import SWEEP, Refused, Sink, Unreachable
from trainer.config import flatten


def open_sink(study: Study, root: Path) -> Outbox:
    """An outbox in the sweep's folder that delivers to its MLflow."""
    tracking = study.spec.tracking
    uri = tracking_uri(root, tracking.uri)
    receiver = MlflowReceiver(root, uri=uri, experiment=tracking.experiment, sweep_id=study.id, sweep=study.spec.name)
    return Outbox(study.folder.outbox, receiver)


def tell_sweep(study: Study, sink: Sink, fingerprint: str) -> None:
    """Start (or start again) the parent run, with the resolved file, the environment and the data's report."""
    folder, spec = study.folder, study.spec
    found = environment()
    path = folder.path / ENVIRONMENT_FILE
    path.write_text(json.dumps(found, indent=1), encoding="utf-8")
    tags = {
        "state": "RUNNING",
        "spec.hash": spec_hash(spec),
        "data.fingerprint": fingerprint,
        "goal": f"{spec.goal.direction} {spec.goal.metric}",
        "mlflow.note.content": spec.description
        or f"A sweep over {', '.join(spec.search.paths) or 'one configuration'}",
    }
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


def remember_run_ids(folder: SweepFolder, study: Study, root: Path) -> str:
    """Keep MLflow's run ids beside the study, so that `status` needs no MLflow; what went wrong, in words."""
    tracking = study.spec.tracking
    uri = tracking_uri(root, tracking.uri)
    try:
        client = connect(root, uri)
        experiment = ensure_experiment(client, root, uri, tracking.experiment)
        runs = client.search_runs([experiment], f"tags.`{SWEEP_ID}` = '{study.id}'", max_results=5000)
    except (Unreachable, Refused) as error:
        return str(error)
    ids = {run.data.tags[RUN]: run.info.run_id for run in runs}
    (folder.path / RUNS_FILE).write_text(json.dumps(ids, indent=1), encoding="utf-8")
    return ""


def _params(spec: SweepSpec) -> dict[str, Any]:
    """How it searches: the leaves outside `base`, which belong to trials."""
    tree = spec.model_dump(mode="json", include={"sampler", "goal", "budget", "resources", "keep_models"})
    searched = {"search": list(spec.search.paths)}
    return flatten(tree) | searched
