"""`MlflowReceiver`: runs, metrics, tags and artifacts in MLflow. A repeated message changes nothing."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.interfaces import SWEEP_RUN, MessageRejected
from orchestrator.tracking.mlflow_client import connect, ensure_experiment, save_view, translate_errors
from orchestrator.tracking.run_metadata import FIRST_ATTEMPT, NOTE, RUN, RUN_NAME, SWEEP_ID, SWEEP_NAME, with_links
from trainer.results import StepMetrics

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric
    from mlflow.entities import Run as MlflowRun

PER_CALL = 900
"""Metrics per call; MLflow's limit is 1000 entities of all kinds."""
_PROBE = "prefsweep.probe"
"""Experiment tag that is written to learn whether the store takes writes."""
_STAGED_ARTIFACT = ".artifact.uploading."
"""Prefix of the files that MLflow's local artifact store writes before it renames them."""
_TimedMetrics = tuple[StepMetrics, float]
PARAMS_PER_CALL = 100
MAX_PARAM_LENGTH = 6000
MAX_TAG_LENGTH = 8000
CUT = " … [cut]"


@dataclass(slots=True)
class _KnownRun:
    """A cached run: MLflow's id and the last step that was logged."""

    id: str
    last_step: int | None


class MlflowReceiver:
    """A TrackingReceiver that writes a sweep to MLflow: a parent run, with a child run per trial and for sft."""

    def __init__(
        self,
        root: Path,
        *,
        uri: str,
        experiment: str,
        artifacts: str | None = None,
        sweep_id: str,
        sweep: str,
        on_run: Callable[[str, str], object] | None = None,
        view: tuple[str, str] | None = None,
    ) -> None:
        """`on_run`: called with the name and MLflow's id of each run; `view`: experiment tag with the saved charts."""
        self._root, self._uri, self._experiment, self._artifacts = root, uri, experiment, artifacts
        self._identity = {SWEEP_ID: sweep_id, SWEEP_NAME: sweep}
        self._client: MlflowClient | None = None
        self._experiment_id = ""
        self._known_runs: dict[str, _KnownRun] = {}
        self._on_run, self._view = on_run, view

    # --- calls of the outbox -------------------------------------------------------------------------------------

    def start_run(self, run: str, *, name: str, params: Mapping[str, Any], tags: Mapping[str, str], at: float) -> None:
        """Create the run, or find the one that an earlier delivery or an earlier driver created."""
        from mlflow.entities import Param

        with self._mlflow() as client:
            found = self._search(client, run)
            if found is not None and tags.get(FIRST_ATTEMPT, "1") != found.data.tags.get(FIRST_ATTEMPT, "1"):
                # The run of a failed attempt stays as it is, under another name; its metrics do not mix with these.
                before = int(tags.get(FIRST_ATTEMPT, "1")) - 1
                name_tags = {RUN: f"{run}, attempt {before}", RUN_NAME: f"{name} failed, attempt {before}"}
                self._set_tags(client, found.info.run_id, name_tags)
                found = None
            if found is None:
                found = client.create_run(
                    self._experiment_id,
                    start_time=_milliseconds(at),
                    tags=_tags(
                        {**self._identity, RUN: run, **self._parent(client, run), **self._with_links(client, tags)}
                    ),
                    run_name=name,
                )
            else:
                self._set_tags(client, found.info.run_id, tags)
                if found.info.status != "RUNNING":
                    client.update_run(found.info.run_id, status="RUNNING")
            self._cache_run(client, run, found)
            missing = [Param(k, param_text(v)) for k, v in params.items() if k not in found.data.params]
            for i in range(0, len(missing), PARAMS_PER_CALL):
                client.log_batch(found.info.run_id, params=missing[i : i + PARAMS_PER_CALL])

    def log_metrics(self, run: str, metrics: Sequence[StepMetrics], *, at: float) -> None:
        """Log metrics after the last logged step, with the message's time, by which MLflow detects repetitions."""
        self.log_metric_history(run, [(metrics, at)])

    def log_metric_history(self, run: str, history: Sequence[tuple[Sequence[StepMetrics], float]]) -> None:
        """Log metrics after the last logged step, in as few calls as MLflow's limit allows."""
        with self._mlflow() as client:
            known = self._find_run(client, run)
            for group in _groups(_new_metrics(known.last_step, history)):
                metrics = [m for step_metrics, at in group for m in _metrics(step_metrics, _milliseconds(at))]
                client.log_batch(known.id, metrics=metrics)
                known.last_step = group[-1][0].step

    def log_final_metrics(self, run: str, values: Mapping[str, float], *, step: int, at: float) -> None:
        """Log the values that differ from the run's newest ones."""
        from mlflow.entities import Metric

        with self._mlflow() as client:
            known = self._find_run(client, run)
            newest = client.get_run(known.id).data.metrics
            fresh = [Metric(n, v, _milliseconds(at), step) for n, v in values.items() if newest.get(n) != v]
            if fresh:
                client.log_batch(known.id, metrics=fresh)

    def set_tags(self, run: str, tags: Mapping[str, str]) -> None:
        """Set tags."""
        with self._mlflow() as client:
            self._set_tags(client, self._find_run(client, run).id, tags)

    def log_artifact(self, run: str, path: Path, folder: str = "") -> None:
        """Attach a file or a folder; an earlier one with the same path is replaced."""
        if not path.exists():
            raise MessageRejected(f"{path} no longer exists")
        with self._mlflow() as client:
            run_id = self._find_run(client, run).id
            _remove_staged_artifacts(client.get_run(run_id).info.artifact_uri or "")
            attach = client.log_artifacts if path.is_dir() else client.log_artifact
            attach(run_id, str(path), folder or None)

    def end_run(self, run: str, *, status: str, tags: Mapping[str, str], at: float) -> None:
        """Set the run's final tags, status and end time."""
        with self._mlflow() as client:
            known = self._find_run(client, run)
            self._set_tags(client, known.id, tags)
            client.set_terminated(known.id, status=status, end_time=_milliseconds(at))

    def probe(self) -> None:
        """Write a tag of the experiment: the time. Raises TrackingUnavailable."""
        with self._mlflow() as client:
            client.set_experiment_tag(self._experiment_id, _PROBE, str(time.time_ns()))

    # --- inside --------------------------------------------------------------------------------------------------

    @contextmanager
    def _mlflow(self) -> Generator[MlflowClient]:
        with translate_errors():
            if self._client is None:
                client = connect(self._root, self._uri)
                self._experiment_id = ensure_experiment(
                    client, self._root, self._uri, self._experiment, self._artifacts
                )
                if self._view is not None:
                    save_view(client, self._experiment_id, self._view)
                self._client = client
            yield self._client

    def _search(self, client: MlflowClient, run: str) -> MlflowRun | None:
        filter_string = f"tags.`{SWEEP_ID}` = '{self._identity[SWEEP_ID]}' and tags.`{RUN}` = '{run}'"
        found = client.search_runs([self._experiment_id], filter_string, max_results=1)
        return found[0] if found else None

    def _cache_run(self, client: MlflowClient, run: str, found: MlflowRun) -> _KnownRun:
        """Cache a run with its last step, read from the store once per run and process."""
        steps = (m.step for key in found.data.metrics for m in client.get_metric_history(found.info.run_id, key))
        self._known_runs[run] = _KnownRun(found.info.run_id, max(steps, default=None))
        if self._on_run is not None:
            self._on_run(run, found.info.run_id)
        return self._known_runs[run]

    def _find_run(self, client: MlflowClient, run: str) -> _KnownRun:
        if run in self._known_runs:
            return self._known_runs[run]
        found = self._search(client, run)
        if found is None:
            raise MessageRejected(f"run {run!r} was never started (or its start was refused)")
        return self._cache_run(client, run, found)

    def _parent(self, client: MlflowClient, run: str) -> dict[str, str]:
        from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

        return {} if run == SWEEP_RUN else {MLFLOW_PARENT_RUN_ID: self._find_run(client, SWEEP_RUN).id}

    def _set_tags(self, client: MlflowClient, run_id: str, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        if tags:
            all_tags = _tags(self._with_links(client, tags))
            client.log_batch(run_id, tags=[RunTag(k, v) for k, v in all_tags.items()])

    def _with_links(self, client: MlflowClient, tags: Mapping[str, str]) -> dict[str, str]:
        """Return the tags, with links to runs and charts in the description resolved."""
        if NOTE not in tags:
            return dict(tags)

        def run_id(run: str) -> str | None:
            if run not in self._known_runs and (found := self._search(client, run)) is not None:
                self._cache_run(client, run, found)
            return self._known_runs[run].id if run in self._known_runs else None

        text = with_links(tags[NOTE], self._experiment_id, self._identity[SWEEP_ID], run_id)
        return {**tags, NOTE: text}


def _remove_staged_artifacts(artifact_uri: str) -> None:
    """Remove what MLflow was writing into a local artifact folder when its process was killed.

    MLflow copies into a temporary file and renames it (mlflow/store/artifact/local_artifact_repo.py). Only the driver
    that holds the lease writes here, so such a file belongs to an earlier one, whose message is delivered again.
    """
    from mlflow.utils.file_utils import local_file_uri_to_path
    from mlflow.utils.uri import is_local_uri

    if is_local_uri(artifact_uri):
        for left in Path(local_file_uri_to_path(artifact_uri)).rglob(f"{_STAGED_ARTIFACT}*"):
            left.unlink(missing_ok=True)


def param_text(value: Any) -> str:
    """Return a param as text: strings unchanged, other values as in the sweep file (null, true, 6e-07, lists)."""
    text = value if isinstance(value, str) else json.dumps(value)
    return _truncate(text, MAX_PARAM_LENGTH)


def _tags(tags: Mapping[str, str]) -> dict[str, str]:
    return {name: _truncate(text, MAX_TAG_LENGTH) for name, text in tags.items()}


def _truncate(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[: longest - len(CUT)] + CUT


def _milliseconds(at: float) -> int:
    return int(at * 1000)


def _metrics(step_metrics: StepMetrics, timestamp: int) -> list[Metric]:
    from mlflow.entities import Metric

    return [Metric(name, value, timestamp, step_metrics.step) for name, value in step_metrics.metrics.items()]


def _new_metrics(last: int | None, history: Sequence[tuple[Sequence[StepMetrics], float]]) -> list[_TimedMetrics]:
    """Return the metrics after step `last`, each with its time; of a repeated step, the first."""
    found: list[_TimedMetrics] = []
    for metrics, at in history:
        fresh = sorted((p for p in metrics if last is None or p.step > last), key=lambda p: p.step)
        found += [(step_metrics, at) for step_metrics in fresh]
        last = fresh[-1].step if fresh else last
    return found


def _groups(metrics: Sequence[_TimedMetrics]) -> Generator[list[_TimedMetrics]]:
    """Groups of complete steps with at most PER_CALL metrics each."""
    group: list[_TimedMetrics] = []
    size = 0
    for step_metrics, at in metrics:
        if group and size + len(step_metrics.metrics) > PER_CALL:
            yield group
            group, size = [], 0
        group.append((step_metrics, at))
        size += len(step_metrics.metrics)
    if group:
        yield group
