"""Case 17: eight sweeps tell one MLflow database at once: one experiment, every point once, nothing locked out."""

import sqlite3
from pathlib import Path

import pytest

from orchestrator.tracking.mlflow_client import connect, ensure_experiment
from orchestrator.tracking.mlflow_receiver import MlflowReceiver
from orchestrator.tracking.outbox import Outbox
from tests.support.local_driver import forked, forked_together
from tests.support.processes import LIMIT_SECONDS
from trainer.results import StepMetrics

SWEEPS, STEPS = 8, 500


def tell(root: Path, number: int) -> None:
    receiver = MlflowReceiver(
        root, uri=f"sqlite:///{root / 'mlflow.db'}", experiment="e", sweep_id=f"id{number}", sweep=f"s{number}"
    )
    box = Outbox(root / f"outbox{number}", receiver)
    box.start_run("sweep", name="s", params={}, tags={}, at=1.0)
    box.start_run("0", name="trial 0", params={"n": number}, tags={}, at=1.0)
    for step in range(STEPS):
        box.log_metrics("0", [StepMetrics(step, {"loss": step / 7, "grad_norm": 1.0})], at=2.0 + step)
    box.end_run("0", status="FINISHED", tags={}, at=1000.0)
    assert box.close(LIMIT_SECONDS) == 0
    assert not (root / f"outbox{number}" / "refused.jsonl").exists()


@pytest.mark.faults
def test_eight_writers_of_one_store(fast_tmp_path: Path) -> None:
    uri = f"sqlite:///{fast_tmp_path / 'mlflow.db'}"
    # As the driver does: tables first, alone. MLflow's migrations do not like company.
    assert forked(lambda: ensure_experiment(connect(fast_tmp_path, uri), fast_tmp_path, uri, "e")) == 0
    assert forked_together(SWEEPS, lambda number: tell(fast_tmp_path, number)) == [0] * SWEEPS
    with sqlite3.connect(fast_tmp_path / "mlflow.db") as store:
        assert store.execute("select count(*) from experiments where name = 'e'").fetchone() == (1,)
        rows = store.execute("select run_uuid, key, count(*), count(distinct step) from metrics group by 1, 2")
        counts = [(rows_, steps) for _, _, rows_, steps in rows]
    assert counts == [(STEPS, STEPS)] * (2 * SWEEPS)
