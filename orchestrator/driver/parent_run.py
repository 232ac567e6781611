"""The sweep's own run: what every trial has in common, told to tracking once.

What the sweep's own run says of it in MLflow: where it stands, the diagnosis, the judge's verdict.

The last thing a sweep does: its report and its description, beside the study and on the parent run.
"""

from __future__ import annotations

import functools
import json
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from orchestrator.driver.data_stage import known_steps, load_report
from orchestrator.execution.stop_reasons import Stop, StopKind
from orchestrator.folders import DATA_FILE, ENVIRONMENT_FILE, RUNS_FILE, SweepFolder
from orchestrator.interfaces import SWEEP, Sink, SweepReporter, View
from orchestrator.redaction import redact
from orchestrator.spec.loading.serialization import spec_hash
from orchestrator.spec.sweep_spec import SweepSpec
from orchestrator.study.study import Study
from orchestrator.tracking.mlflow_sink import MlflowReceiver, tracking_uri
from orchestrator.tracking.outbox import Outbox
from orchestrator.tracking.run_metadata import NOTE, environment, environment_tags
from trainer.config.trial import flatten
from trainer.storage.atomic_files import write_json


def open_sink(study: Study, root: Path, reporter: SweepReporter) -> Outbox:
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
        view=reporter.charts_view(study.spec),
    )
    return Outbox(study.folder.outbox, receiver, fence=study.check_fence)


def tell_sweep(
    study: Study, sink: Sink, reporter: SweepReporter, fingerprint: str, adapters: Sequence[str] = ()
) -> None:
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
        NOTE: reporter.describe(study, "running", steps=None, diagnose=False),
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


FAILURE_FILE = "report-failure.txt"


def tell_standing(study: Study, sink: Sink, reporter: SweepReporter, state: str = "running") -> None:
    """Describe the sweep as it stands now, with the diagnosis once a trial has completed."""
    steps = known_steps(study.folder, study.spec)
    try:
        text = reporter.describe(study, state, steps=steps)
    except Exception as why:  # noqa: BLE001 - a bug in a rule must not end days of training; it is kept and told
        keep_failure(study, "diagnosis", why)
        text = reporter.describe(study, state, steps=steps, diagnose=False)
    sink.tag(SWEEP, {NOTE: text})


def keep_failure(study: Study, what: str, why: Exception) -> str:
    """A page that failed, kept in the history and, with its traceback, in a file beside the study; told in a line."""
    said = redact(f"{type(why).__name__}: {why}")
    place = study.folder.path / FAILURE_FILE
    place.write_text(redact("".join(traceback.format_exception(why))), encoding="utf-8")
    study.note(f"{what} failed", said)
    return f"{said}; the traceback is in {place}"


OVER = frozenset({StopKind.FINISHED, StopKind.OUT_OF_BUDGET, StopKind.TARGET, StopKind.SAME_BUG})


def write_last_report(study: Study, sink: Sink, view: View, reporter: SweepReporter, ended: Stop) -> None:
    """Write report.html and attach it, unless the sweep was interrupted and goes on later."""
    if not study.trials():
        return
    if ended.kind not in OVER:
        tell_standing(study, sink, reporter, "interrupted")
        return
    view.stage("writing the report")
    attach_report(study, sink, reporter, view.say, "finished" if ended.kind is StopKind.FINISHED else "interrupted")


def attach_report(study: Study, sink: Sink, reporter: SweepReporter, say: Callable[[str], None], state: str) -> None:
    """Write report.html and its figures, attach them to the parent run, describe it. `state`: as the report says."""
    try:
        files = reporter.write_report(study, state, steps=known_steps(study.folder, study.spec))
    except Exception as why:  # noqa: BLE001 - a bug in a page must not end days of training; it is kept and told
        kept = keep_failure(study, "report", why)
        say(f"the report could not be made ({kept}); try orchestrate report {study.spec.name}")
        tell_standing(study, sink, reporter, state)
        return
    sink.artifact(SWEEP, files.page)
    sink.artifact(SWEEP, files.figures, "figures")
    sink.tag(SWEEP, {NOTE: files.description})
