"""A trial that is retried after a failure gets a run of its own; the failed attempt's stays as it was."""

import shutil
from pathlib import Path

from orchestrator.interfaces import SWEEP_RUN
from orchestrator.tracking.mlflow_receiver import MlflowReceiver
from orchestrator.tracking.outbox import Outbox
from orchestrator.tracking.run_metadata import FIRST_ATTEMPT
from tests.support.metrics import evaluated
from tests.support.processes import LIMIT_SECONDS
from tests.support.specs import METRIC


def test_a_retried_trials_values_do_not_mix_with_the_failed_attempts(tmp_path: Path, empty_mlflow: Path) -> None:
    shutil.copy(empty_mlflow, tmp_path / "mlflow.db")
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"

    def opened() -> Outbox:
        return Outbox(tmp_path / "outbox", MlflowReceiver(tmp_path, uri=uri, experiment="e", sweep_id="x", sweep="s"))

    sink = opened()
    sink.start_run(SWEEP_RUN, name="s", params={}, tags={}, at=1.0)
    sink.start_run("3", name="trial 3", params={"seed": 1}, tags={"attempt": "1"}, at=1.0)
    sink.log_metrics("3", [evaluated(0, 0.1), evaluated(5, 0.2)], at=2.0)
    sink.end_run("3", status="FAILED", tags={"state": "FAILED"}, at=3.0)
    retried = {"attempt": "2", FIRST_ATTEMPT: "2"}
    sink.start_run("3", name="trial 3", params={"seed": 1}, tags=retried, at=4.0)
    sink.log_metrics("3", [evaluated(0, 0.6)], at=5.0)
    assert sink.close(LIMIT_SECONDS) == 0
    sink = opened()  # the driver was killed: the same run goes on, its points once
    sink.start_run("3", name="trial 3", params={"seed": 1}, tags=retried | {"attempt": "3"}, at=6.0)
    sink.log_metrics("3", [evaluated(0, 0.6), evaluated(5, 0.7)], at=7.0)
    sink.end_run("3", status="FINISHED", tags={"state": "COMPLETE"}, at=8.0)
    assert sink.close(LIMIT_SECONDS) == 0

    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    (experiment,) = [e for e in client.search_experiments() if e.name == "e"]
    runs = {r.data.tags["prefsweep.run"]: r for r in client.search_runs([experiment.experiment_id])}
    curves = {
        name: [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, METRIC)]
        for name, run in runs.items()
        if name != SWEEP_RUN
    }
    assert curves == {"3": [(0, 0.6), (5, 0.7)], "3, attempt 1": [(0, 0.1), (5, 0.2)]}
    assert (runs["3"].info.status, runs["3, attempt 1"].info.status) == ("FINISHED", "FAILED")
    assert runs["3, attempt 1"].data.tags["mlflow.runName"] == "trial 3 failed, attempt 1"
