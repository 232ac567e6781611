"""A real MLflow server over a store of its own, and an outbox that tells it of one trial."""

import sqlite3
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from orchestrator.tracking.mlflow_client import tracking_uri
from orchestrator.tracking.mlflow_receiver import MlflowReceiver
from orchestrator.tracking.mlflow_ui import UiServer, start_ui
from orchestrator.tracking.outbox import Outbox


@contextmanager
def serving(runs: Path) -> Generator[UiServer]:
    ui = start_ui(runs, tracking_uri(runs, f"sqlite:///{runs / 'mlflow.db'}"))
    try:
        yield ui
    finally:
        ui.stop()


def receiver(runs: Path, uri: str) -> MlflowReceiver:
    return MlflowReceiver(runs, uri=uri, experiment="e", sweep_id="id", sweep="s")


def begin(box: Outbox) -> None:
    box.start_run("sweep", name="s", params={}, tags={}, at=1.0)
    box.start_run("0", name="s 0", params={"loss.beta": 2.0}, tags={}, at=1.0)


def steps(runs: Path) -> list[int]:
    with sqlite3.connect(runs / "mlflow.db") as store:
        return [row[0] for row in store.execute("select step from metrics where key = 'loss' order by step")]
